// Matrices in block formats: their values, for products of many rows and for embeddings, and the blocks of values. A warp takes a
// tile of 16 rows and 64 columns.
#include <cuda_fp8.h>
#include "launch.cuh"
#include "quantized.cuh"
#include "values.cuh"

namespace still {

constexpr int WARPS = 8;

__device__ __forceinline__ void store_four(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_four(__nv_bfloat16* to, const float (&x)[4]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// The warp's tile among `rows` rows of them: which row of tiles, which column of tiles; false past the last.
__device__ __forceinline__ bool warp_tile(int64_t rows, int steps, int64_t& row, int& step) {
  const int64_t at = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  row = at / steps, step = at % steps;
  return row < rows;
}

inline dim3 warp_grid(int64_t tiles) { return dim3((tiles + WARPS - 1) / WARPS); }

template <class F, class T>
__global__ __launch_bounds__(WARPS * 32) void dequantize(const StillDequantize a) {
  const int lane = threadIdx.x % 32;
  const int64_t first_tile = a.first / TILE_ROWS, last = (a.first + a.count - 1) / TILE_ROWS;
  int64_t at;
  int step;
  if (!warp_tile(a.ids ? a.count : last - first_tile + 1, column_tiles(a.columns), at, step)) return;
  const int named = a.ids ? a.ids[at] : 0;
  const int tile = a.ids ? named / TILE_ROWS : first_tile + at;
  const TileRow<F> row(a.matrix, a.rows, a.columns, tile);
  typename F::Codes codes;
  typename F::Scales scales;
  F::load(codes, row.codes + int64_t(step) * F::CODES, lane);
  F::load(scales, row, step, step, lane);
#pragma unroll
  for (int block = 0; block < 2; block++) {
    Fragments values;
    F::fragments(codes, block, BASE, values);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int from = tile * TILE_ROWS + lane / 4 + 8 * r, column = step * TILE_COLUMNS + block * BLOCK + half * 16 + lane % 4 * 4;
        const bool wanted = a.ids ? from == named : from >= a.first && from < a.first + a.count;
        if (!wanted || column >= a.columns) continue;
        const float scale = F::scale(scales, r, block, half), offset = F::offset(scales, r, block);
        const float2 low = unpack(values[half][r]), high = unpack(values[half][2 + r]);
        const float four[4] = {scale * low.x + offset, scale * low.y + offset, scale * high.x + offset, scale * high.y + offset};
        const int64_t place = a.ids ? at : from - a.first;
        store_four(static_cast<T*>(a.to) + place * a.columns + column, four);
      }
  }
}

// Rows g and g + 8 of the lane's values of a tile, by block and half; zeros past the last.
template <class T>
__device__ __forceinline__ void read_tile(const T* from, int rows, int columns, int tile, int step, float (&x)[2][2][2][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int block = 0; block < 2; block++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int row = tile * TILE_ROWS + lane / 4 + 8 * r;
          const int column = step * TILE_COLUMNS + block * BLOCK + half * 16 + lane % 4 * 4 + i;
          x[r][block][half][i] = row < rows && column < columns ? to_f32(from[int64_t(row) * columns + column]) : 0.f;
        }
}

// Four bytes as a word has them: columns 0, 2, 1, 3.
__device__ __forceinline__ uint32_t word_of(const uint32_t (&byte)[4]) { return byte[0] | byte[2] << 8 | byte[1] << 16 | byte[3] << 24; }

// As GGUF's tools quantize: the largest of 32 becomes 127.
template <class T>
__global__ __launch_bounds__(WARPS * 32) void quantize_q8_0(const T* from, int rows, int columns, uint32_t* to) {
  const int lane = threadIdx.x % 32, steps = column_tiles(columns);
  int64_t tile;
  int step;
  if (!warp_tile(row_tiles(rows), steps, tile, step)) return;
  float x[2][2][2][4];
  read_tile(from, rows, columns, tile, step, x);
  uint32_t* codes = to + (tile * steps + step) * Q8_0::CODES;
  uint32_t* scales = to + int64_t(row_tiles(rows)) * steps * Q8_0::CODES + (tile * steps + step) * Q8_0::SCALES;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    uint32_t both = 0;
#pragma unroll
    for (int block = 0; block < 2; block++) {
      float most = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(x[r][block][i / 4][i % 4]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float scale = most / 127.f, inverse = scale > 0.f ? 1.f / scale : 0.f;
      both |= uint32_t(__half_as_ushort(__float2half_rn(scale))) << 16 * block;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t byte[4];
#pragma unroll
        for (int i = 0; i < 4; i++) byte[i] = uint32_t(int(roundf(x[r][block][half][i] * inverse))) & 0xffu;
        codes[r * 128 + lane * 4 + 2 * block + half] = word_of(byte);
      }
    }
    if (lane % 4 == 0) scales[lane / 4 * 2 + r] = both;
  }
}

constexpr float E4M3_MOST = 448.f;

// The largest of a row becomes the format's largest number. A warp takes a row, those past the last too.
template <class T>
__global__ __launch_bounds__(WARPS * 32) void row_scales(const T* from, int rows, int columns, float* to) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= row_tiles(rows) * TILE_ROWS) return;
  float most = 0.f;
  if (row < rows)
    for (int column = lane; column < columns; column += 32) most = fmaxf(most, fabsf(to_f32(from[int64_t(row) * columns + column])));
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  const int r = row % TILE_ROWS;
  if (lane == 0) to[row / TILE_ROWS * TILE_ROWS + r % 8 * 2 + r / 8] = most / E4M3_MOST;
}

template <class T>
__global__ __launch_bounds__(WARPS * 32) void quantize_e4m3(const T* from, int rows, int columns, uint32_t* to) {
  const int lane = threadIdx.x % 32, steps = column_tiles(columns);
  int64_t tile;
  int step;
  if (!warp_tile(row_tiles(rows), steps, tile, step)) return;
  float x[2][2][2][4];
  read_tile(from, rows, columns, tile, step, x);
  uint32_t* codes = to + (tile * steps + step) * E4M3::CODES;
  const TileRow<E4M3> row(to, rows, columns, tile);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float scale = reinterpret_cast<const float*>(row.shared)[lane / 4 * 2 + r], inverse = scale > 0.f ? 1.f / scale : 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t byte[4];
#pragma unroll
      for (int k = 0; k < 4; k++) byte[k] = __nv_cvt_float_to_fp8(x[r][i / 2][i % 2][k] * inverse, __NV_SATFINITE, __NV_E4M3);
      codes[r * 128 + lane * 4 + i] = word_of(byte);
    }
  }
}

}  // namespace still

using namespace still;

int64_t still_quantized_words(int32_t format, int32_t rows, int32_t columns) {
  return by_format(format, int64_t(0), [&](auto f) { return matrix_words<decltype(f)>(rows, columns); });
}

int still_dequantize(const StillDequantize* args, StillStream stream) {
  const StillDequantize& a = *args;
  const bool inside = a.rows > 0 && a.first >= 0 && a.count > 0 && (a.ids || a.count <= a.rows - a.first);
  if (!inside || a.columns <= 0 || a.columns % 4) return cudaErrorInvalidValue;
  return by_format(a.format, int(cudaErrorInvalidValue), [&](auto f) {
    return by_dtype(a.dtype, [&](auto t) {
      const int64_t tiles = a.ids ? a.count : (a.first + a.count - 1) / TILE_ROWS - a.first / TILE_ROWS + 1;
      return launch(dequantize<decltype(f), decltype(t)>, warp_grid(tiles * column_tiles(a.columns)), WARPS * 32, 0, stream, a);
    });
  });
}

int still_quantize(int32_t format, int32_t dtype, int32_t rows, int32_t columns, const void* from, void* to, StillStream stream) {
  if (rows <= 0 || columns <= 0) return cudaErrorInvalidValue;
  return by_dtype(dtype, [&](auto t) -> int {
    using T = decltype(t);
    const T* values = static_cast<const T*>(from);
    uint32_t* words = static_cast<uint32_t*>(to);
    const dim3 grid = warp_grid(int64_t(row_tiles(rows)) * column_tiles(columns));
    if (format == STILL_Q8_0) return launch(quantize_q8_0<T>, grid, WARPS * 32, 0, stream, values, rows, columns, words);
    if (format != STILL_E4M3) return cudaErrorInvalidValue;
    float* scales = reinterpret_cast<float*>(words + int64_t(row_tiles(rows)) * column_tiles(columns) * E4M3::CODES);
    const int error = launch(row_scales<T>, warp_grid(row_tiles(rows) * TILE_ROWS), WARPS * 32, 0, stream, values, rows, columns, scales);
    return error != cudaSuccess ? error : launch(quantize_e4m3<T>, grid, WARPS * 32, 0, stream, values, rows, columns, words);
  });
}
