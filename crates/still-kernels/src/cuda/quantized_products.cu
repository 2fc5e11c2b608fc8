// Products of up to eight rows with matrices in block formats: their codes are read once, as they are.
//
// Tensor cores take 16 rows of a matrix with up to 8 columns of x at the price of one, so that what is left to do for a weight is
// to make bf16 of its code (which is exact), 1.75 instructions of a lane where there are 8 bits. A block of 32 is multiplied by its
// scale once it is summed. x is held in bf16 planes as in tile.cuh: two where it is f32 or goes through a norm, whose product is
// not rounded either way, if they fit the 8 columns.
//
// The warps of a block take a part of the columns each, for all rows of the block, and stage their own part of x in shared
// memory; nothing waits for another warp before the end. The norm of x needs no pass of its own: its sum(x^2) is gathered while x
// is staged, and the products are scaled at the end.
#include "quantized.cuh"
#include "small_batch.cuh"

namespace still {

constexpr int WARPS = 8, COLUMNS = 8;

// Bytes of x that a block stages at a time.
constexpr int STAGED = 48 * 1024;

struct Plan {
  int planes, capacity;  // planes of x; tiles of 64 columns that a warp stages at a time
};

template <class X>
__device__ __forceinline__ void stage_row(const X* x, const X* norm, int inner, int from, int to, int planes, int row, int columns,
                                          uint2* staged, float& square) {
  for (int at = from + threadIdx.x % 32 * 8; at < to; at += 32 * 8) {
    float value[8] = {};
    if (at < inner) {
      constexpr int COUNT = Pack<X>::COUNT;
#pragma unroll
      for (int i = 0; i < 8; i += COUNT) {
        const Pack<X> pack = load_pack(x + at + i);
#pragma unroll
        for (int k = 0; k < COUNT; k++) value[i + k] = pack.value[k];
        if (norm) {
          const Pack<X> by = load_pack(norm + at + i);
#pragma unroll
          for (int k = 0; k < COUNT; k++) {
            square += value[i + k] * value[i + k];
            value[i + k] *= by.value[k];
          }
        }
      }
    }
    // Each four columns go to the lanes that multiply by them: [block][column of the product][t][half].
    const int block = (at - from) / BLOCK, four = at % BLOCK / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float *v = value + 4 * i;
      const uint2 high = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
      const int place = (four + i) % 4 * 2 + four / 4;
      staged[(block * columns + row * planes) * 8 + place] = high;
      if (planes == 2) {
        const float2 a = unpack(high.x), b = unpack(high.y);
        staged[(block * columns + row * planes + 1) * 8 + place] = make_uint2(pack(v[0] - a.x, v[1] - a.y), pack(v[2] - b.x, v[3] - b.y));
      }
    }
  }
}

template <class F, int TILES>
__global__ __launch_bounds__(WARPS * 32, 3) void quantized_products_kernel(const __grid_constant__ Products products, Plan plan) {
  extern __shared__ uint4 shared[];
  __shared__ float sums[WARPS][TILES][TILE_ROWS][COLUMNS], squares[WARPS][COLUMNS];
  constexpr int DEPTH = F::DEPTH / TILES;
  const StillSmallBatchProducts& a = products.all;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane / 4;
  const int each = a.gated ? 1 : TILES, matrices = a.gated ? 1 : a.count;
  int group = blockIdx.x, which = 0;
  for (; which + 1 < matrices; which++) {
    const int groups = (row_tiles(products.factor[which].out) + each - 1) / each;
    if (group < groups) break;
    group -= groups;
  }
  const StillFactor& factor = products.factor[which];
  const int out = factor.out, last = row_tiles(out) - 1;
  TileRow<F> rows[TILES];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int at = group * each + (a.gated ? 0 : tile);  // past the last: read, not written
    rows[tile] = TileRow<F>(a.gated && tile ? products.factor[1].weight : factor.weight, out, a.inner, at < last ? at : last);
  }

  const int steps = column_tiles(a.inner), from = steps * warp / WARPS, to = steps * (warp + 1) / WARPS;
  typename F::Codes codes[TILES][DEPTH];
  typename F::Scales scales[TILES][DEPTH];
  auto load = [&](int at, int step) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      F::load(codes[tile][at], rows[tile].codes + int64_t(step) * F::CODES, lane);
      F::load(scales[tile][at], rows[tile], step, lane);
    }
  };
#pragma unroll
  for (int i = 0; i < DEPTH; i++)
    if (from + i < to) load(i, from + i);

  const int columns = a.rows * plan.planes;
  uint4* own = shared + warp * plan.capacity * 2 * columns * 4;
  auto stage = [&](int step, bool first) {
    const int end = step + plan.capacity < to ? step + plan.capacity : to;
    __syncwarp();
    for (int row = 0; row < a.rows; row++) {
      float square = 0.f;
      auto of = [&](auto type) {
        using X = decltype(type);
        stage_row(static_cast<const X*>(a.x) + int64_t(row) * a.inner, static_cast<const X*>(a.norm), a.inner, step * TILE_COLUMNS,
                  end * TILE_COLUMNS, plan.planes, row, columns, reinterpret_cast<uint2*>(own), square);
      };
      if (a.dtype == STILL_F32)
        of(float{});
      else
        of(__nv_bfloat16{});
      square = warp_sum(square);
      if (lane == 0) squares[warp][row] = first ? square : squares[warp][row] + square;
    }
    __syncwarp();
  };
  if (from == to && lane < COLUMNS) squares[warp][lane] = 0.f;

  float sum[TILES][4] = {};
  int staged = from;
  for (int step = from; step < to; step += DEPTH) {
    if (step == from || step - staged >= plan.capacity) {
      stage(step, step == from);
      staged = step;
    }
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      if (step + i >= to) break;
#pragma unroll
      for (int block = 0; block < 2; block++) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (column < columns) x = own[(((step - staged + i) * 2 + block) * columns + column) * 4 + lane % 4];
        float of_x[4] = {};
        if constexpr (F::OFFSET) {  // the sum of x over the block, in the registers where the products are
          const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
          mma(of_x, ones, x.x, x.y);
          mma(of_x, ones, x.z, x.w);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          Fragments weights;
          F::fragments(codes[tile][i], block, weights);
          float product[4] = {};
          auto scaled = [&](int half) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
              sum[tile][k] += F::scale(scales[tile][i], k / 2, block, half) * product[k];
              product[k] = 0.f;
            }
          };
          if constexpr (F::GROUP == 0) {
            mma(sum[tile], weights[0], x.x, x.y);
            mma(sum[tile], weights[1], x.z, x.w);
          } else {
            mma(product, weights[0], x.x, x.y);
            if constexpr (F::GROUP == 16) scaled(0);
            mma(product, weights[1], x.z, x.w);
            scaled(1);
          }
          if constexpr (F::OFFSET)
#pragma unroll
            for (int k = 0; k < 4; k++) sum[tile][k] += F::offset(scales[tile][i], k / 2, block) * of_x[k];
        }
      }
      if (step + i + DEPTH < to) load(i, step + i + DEPTH);
    }
  }

#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<float2*>(&sums[warp][tile][lane / 4 + 8 * half][lane % 4 * 2]) =
          make_float2(sum[tile][2 * half], sum[tile][2 * half + 1]);
  __syncthreads();

  const int written = a.gated ? 1 : TILES;
  for (int i = threadIdx.x; i < written * TILE_ROWS * a.rows; i += WARPS * 32) {
    const int r = i % TILE_ROWS, tile = i / TILE_ROWS % written, n = i / (TILE_ROWS * written);
    const int row = (group * each + tile) * TILE_ROWS + r;
    if (row >= out) continue;
    float scale = 1.f;
    if (a.norm) {
      float square = 0.f;
      for (int w = 0; w < WARPS; w++) square += squares[w][n];
      scale = rsqrtf(square / a.inner + a.eps);
    }
    auto total = [&](int tile) {
      float y = 0.f;
      for (int w = 0; w < WARPS; w++)
        for (int plane = 0; plane < plan.planes; plane++) y += sums[w][tile][r][n * plan.planes + plane];
      if constexpr (F::GROUP == 0) y *= reinterpret_cast<const float*>(rows[tile].shared)[r % 8 * 2 + r / 8];
      return y * scale;
    };
    float y = total(tile);
    if (factor.update)
      for (int k = 0; k < factor.rank; k++)
        y += factor.update_scale * factor.update[int64_t(row) * factor.rank + k] * factor.low[n * factor.rank + k];
    if constexpr (TILES > 1)
      if (a.gated) y = y / (1.f + __expf(-y)) * total(1);
    const int64_t place = int64_t(n) * out + row;
    auto write = [&](auto type) {
      using X = decltype(type);
      if (factor.bias) y += to_f32(static_cast<const X*>(factor.bias)[row]);
      if (factor.add) y += to_f32(static_cast<const X*>(factor.add)[place]);
      if (a.to_dtype == STILL_F32)
        static_cast<float*>(factor.to)[place] = y;
      else
        from_f32(static_cast<X*>(factor.to) + place, y);
    };
    if (a.dtype == STILL_F32)
      write(float{});
    else
      write(__nv_bfloat16{});
  }
}

template <class F, int TILES>
int launch_quantized(const Products& products, int planes, StillStream stream) {
  constexpr int DEPTH = F::DEPTH / TILES;
  const StillSmallBatchProducts& a = products.all;
  const int each = a.gated ? 1 : TILES, matrices = a.gated ? 1 : a.count;
  int groups = 0;
  for (int i = 0; i < matrices; i++) groups += (row_tiles(products.factor[i].out) + each - 1) / each;
  // Tiles that a warp may have, in whole rounds of the loop, or as many as are staged at a time.
  const int tile_bytes = 2 * a.rows * planes * BLOCK * 2, most = (column_tiles(a.inner) + WARPS - 1) / WARPS;
  int capacity = STAGED / WARPS / tile_bytes;
  if (most < capacity) capacity = most;
  capacity = (capacity + DEPTH - 1) / DEPTH * DEPTH;
  return launch(quantized_products_kernel<F, TILES>, dim3(groups), WARPS * 32, WARPS * capacity * tile_bytes, stream, products,
                Plan{planes, capacity});
}

int quantized_products(const Products& products, StillStream stream) {
  const StillSmallBatchProducts& a = products.all;
  if (a.dtype != STILL_F32 && a.dtype != STILL_BF16) return cudaErrorInvalidValue;
  if (a.rows < 1 || a.rows > (a.dtype == STILL_F32 ? COLUMNS / 2 : COLUMNS)) return cudaErrorInvalidValue;
  const int planes = a.dtype == STILL_F32 || (a.norm && a.rows <= COLUMNS / 2) ? 2 : 1;
  int tiles = 0;
  for (int i = 0; i < a.count; i++) tiles += row_tiles(products.factor[i].out);
  return by_format(products.factor[0].format, int(cudaErrorInvalidValue), [&](auto format) {
    using F = decltype(format);
    // Two tiles share what is staged; of few tiles every one has a block, so that more wait for memory together.
    return a.gated || tiles >= 2048 ? launch_quantized<F, 2>(products, planes, stream) : launch_quantized<F, 1>(products, planes, stream);
  });
}

}  // namespace still
