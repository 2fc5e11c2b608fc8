// Matrices in shared memory.
//
// A value is held in P planes of bf16: one if the data are bf16; two (x = high + low, 16 bits of mantissa) if they are
// f32, whose products are then three bf16 products. One kernel serves both.
//
// In shared memory a row is cut into panels of 64 columns (128 bytes), whose 16-byte pieces are permuted by the row
// (piece ^ row % 8): ldmatrix reads it without bank conflicts, and it is the layout that wgmma calls 128-byte swizzle.
#pragma once
#include "mma.cuh"

namespace still {

constexpr int CHUNK = 64;
constexpr float LOG2E = 1.4426950408889634f;

template <class T> constexpr int planes = 2;
template <> constexpr int planes<__nv_bfloat16> = 1;

__device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(x);
}
__device__ __forceinline__ float2 unpack(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

// Two values in P planes.
template <int P>
__device__ __forceinline__ void split(float x, float y, uint32_t (&to)[P]) {
  to[0] = pack(x, y);
  if constexpr (P == 2) {
    float2 h = unpack(to[0]);
    to[1] = pack(x - h.x, y - h.y);
  }
}

__device__ __forceinline__ void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack(x, y); }

__device__ __forceinline__ float2 read_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 read_pair(const __nv_bfloat16* from) { return unpack(*reinterpret_cast<const uint32_t*>(from)); }

template <int P_, int ROWS_, int COLS_>
struct Tile {
  static constexpr int P = P_, ROWS = ROWS_, COLS = COLS_;
  static constexpr int PANEL = ROWS * 128, PLANE = (COLS + 63) / 64 * PANEL, BYTES = P * PLANE;
  uint32_t base;

  // Address of the 16-byte piece that holds (row, col).
  __device__ __forceinline__ uint32_t at(int plane, int row, int col) const {
    return base + plane * PLANE + (col >> 6) * PANEL + row * 128 + ((((col & 63) >> 3) ^ (row & 7)) << 4);
  }
};

// Two values from (row, col) of a tile, col even.
template <class TILE>
__device__ __forceinline__ float2 read_pair(TILE tile, int row, int col) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int p = 0; p < TILE::P; p++) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(tile.at(p, row, col & ~7) + (col & 7) * 2) : "memory");
    float2 part = unpack(x);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// Eight values to (row, col) of a tile, asynchronously where the data are bf16; zeros if `from` is null.
template <class T, class TILE>
__device__ __forceinline__ void copy_piece(TILE tile, int row, int col, const T* from, const T* any) {
  const uint32_t to = tile.at(0, row, col);
  if constexpr (TILE::P == 1) {
    copy_async(to, from ? from : any, from != nullptr);
  } else {
    uint4 high = make_uint4(0, 0, 0, 0), low = high;
    if (from) {
      float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
      uint32_t x[2], y[2], z[2], w[2];
      split<2>(a.x, a.y, x); split<2>(a.z, a.w, y); split<2>(b.x, b.y, z); split<2>(b.z, b.w, w);
      high = make_uint4(x[0], y[0], z[0], w[0]);
      low = make_uint4(x[1], y[1], z[1], w[1]);
    }
    store_shared(to, high);
    store_shared(to + TILE::PLANE, low);
  }
}

// Copies `count` rows to rows `first..` of a tile, asynchronously where the data are bf16. `row_of(i)` points at row i or
// is null (zeros).
template <int THREADS, class T, class TILE, class RowOf>
__device__ __forceinline__ void load_rows(TILE tile, int first, int count, const T* any, RowOf row_of) {
  constexpr int PIECES = TILE::COLS / 8;
  for (int i = threadIdx.x; i < count * PIECES; i += THREADS) {
    int row = i / PIECES, col = i % PIECES * 8;
    const T* from = row_of(row);
    copy_piece(tile, first + row, col, from ? from + col : nullptr, any);
  }
}

// The same for rows `stride` apart, of which `valid` exist.
template <int THREADS, int COUNT, class T, class TILE>
__device__ __forceinline__ void load_matrix(TILE tile, int first, const T* from, int64_t stride, int valid = COUNT) {
  constexpr int PIECES = TILE::COLS / 8, STEPS = (COUNT * PIECES + THREADS - 1) / THREADS;
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int i = threadIdx.x + j * THREADS, row = i / PIECES, col = i % PIECES * 8;
    if (COUNT * PIECES % THREADS != 0 && i >= COUNT * PIECES) break;
    copy_piece(tile, first + row, col, row < valid ? from + row * stride + col : nullptr, from);
  }
}

}  // namespace still
