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
//
// A block has as many warps as let all blocks be resident together, so that no multiprocessor ends with less work than others.
#include <algorithm>
#include "quantized_stage.cuh"
#include "quantized_stream.cuh"

namespace still {

constexpr int COLUMNS = 8;

// 128 registers a thread: 16 warps a multiprocessor, each with four tiles of 1 KiB on their way.
constexpr int RESIDENT_WARPS = 16, MOST_WARPS = 8;

// Tiles that are brought to the second-level cache, behind those in registers, while the kernel before ends.
constexpr int PREFETCHED = 4;

// Bytes of x that a block stages at a time, and all of a multiprocessor.
constexpr int STAGED = 48 * 1024, STAGED_BY_ALL = 160 * 1024;

struct Plan {
  int planes, capacity;  // planes of x; tiles of 64 columns that a warp stages at a time
  uint32_t base;         // BASE
};

// The value that a thread writes: of row `n` of x and row `r` of a tile.
template <int TILES>
struct Written {
  int n, r, tile, row;  // `row`: of the matrix
  bool writes;
  int64_t place;

  __device__ __forceinline__ Written(const StillSmallBatchProducts& a, int first, int out) : r(threadIdx.x % TILE_ROWS) {
    const int written = a.gated ? 1 : TILES;
    tile = threadIdx.x / TILE_ROWS % written;
    n = threadIdx.x / (TILE_ROWS * written);
    row = (first + tile) * TILE_ROWS + r;
    writes = n < a.rows && row < out;
    place = int64_t(n) * out + row;
  }
  // The bits of a value that is added to it; zero if there is none.
  __device__ __forceinline__ uint32_t bits(const StillSmallBatchProducts& a, const void* from, int64_t at) const {
    if (!writes || !from) return 0;
    return a.dtype == STILL_F32 ? static_cast<const uint32_t*>(from)[at] : static_cast<const uint16_t*>(from)[at];
  }
};

template <int TILES>
using WarpSums = float[MOST_WARPS][TILES][TILE_ROWS][COLUMNS];

// Leaves a value: the warps' sums in order, scaled by the norm, with the low-rank update, through the activation, and what is `added`.
template <class F, int TILES>
__device__ __forceinline__ void leave_product(const StillSmallBatchProducts& a, const StillFactor& factor, const TileStream<F, TILES>& tiles,
                                              const Written<TILES>& at, const WarpSums<TILES>& sums, const float (&squares)[MOST_WARPS][COLUMNS],
                                              int planes, const uint32_t (&added)[2]) {
  const int warps = blockDim.x / 32;
  float scale = 1.f;
  if (a.norm) {
    float square = 0.f;
    for (int w = 0; w < warps; w++) square += squares[w][at.n];
    scale = rsqrtf(square / a.inner + a.eps);
  }
  auto total = [&](int tile) {
    float y = 0.f;
    for (int w = 0; w < warps; w++)
      for (int plane = 0; plane < planes; plane++) y += sums[w][tile][at.r][at.n * planes + plane];
    if constexpr (F::GROUP == 0)
      y *= reinterpret_cast<const float*>(tile ? tiles.rows[TILES - 1].shared : tiles.rows[0].shared)[at.r % 8 * 2 + at.r / 8];
    return y * scale;
  };
  float y = total(at.tile);
  if (factor.update)
    for (int k = 0; k < factor.rank; k++)
      y += factor.update_scale * factor.update[int64_t(at.row) * factor.rank + k] * factor.low[at.n * factor.rank + k];
  if constexpr (TILES > 1)
    if (a.gated) y = y / (1.f + __expf(-y)) * total(1);
  for (const uint32_t x : added) y += __uint_as_float(a.dtype == STILL_F32 ? x : x << 16);
  if (a.to_dtype == STILL_F32)
    static_cast<float*>(factor.to)[at.place] = y;
  else  // of dtype, which is bf16
    from_f32(static_cast<__nv_bfloat16*>(factor.to) + at.place, y);
}

template <class F, int TILES>
__global__ __launch_bounds__(MOST_WARPS * 32, RESIDENT_WARPS / MOST_WARPS) void quantized_products_kernel(
    const __grid_constant__ Products products, Plan plan) {
  extern __shared__ uint4 shared[];
  __shared__ WarpSums<TILES> sums;
  __shared__ float squares[MOST_WARPS][COLUMNS];
  constexpr int DEPTH = F::DEPTH / TILES;
  let_next_begin();
  const StillSmallBatchProducts& a = products.all;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane / 4;
  const int each = a.gated ? 1 : TILES, matrices = a.gated ? 1 : a.count;
  int group = blockIdx.x, which = 0;
  for (; which + 1 < matrices; which++) {
    const int groups = (row_tiles(products.factor[which].out) + each - 1) / each;
    if (group < groups) break;
    group -= groups;
  }
  const StillFactor& factor = products.factor[which];

  const int steps = column_tiles(a.inner), from = steps * warp / warps, to = steps * (warp + 1) / warps;
  TileStream<F, TILES> tiles(products, factor, group * each, from);
#pragma unroll
  for (int i = 0; i < DEPTH; i++)
    if (from + i < to) tiles.load(i, i, from + i);
  tiles.prefetch(min(PREFETCHED, to - from - DEPTH));
  wait_for_previous();

  const Written<TILES> written(a, group * each, factor.out);
  const int columns = a.rows * plan.planes, stride = columns * 4;
  uint4* const own = shared + warp * plan.capacity * 2 * stride;
  // Lanes of a column that no row of x has take another's: what it gives is not looked at.
  const uint4* const lane_place = own + (column < columns ? column : columns - 1) * 4 + lane % 4;
  float sum[TILES][4] = {};
  // What is added is loaded before the last part is multiplied, and looked at when it is long there.
  uint32_t added[2];
  for (int step = from;;) {
    const int end = min(step + plan.capacity, to);
    stage(a, step, end, step == from, plan.planes, squares[warp], reinterpret_cast<uint2*>(own));
    const bool last = end == to;
    if (last) added[0] = written.bits(a, factor.bias, written.row), added[1] = written.bits(a, factor.add, written.place);
    for (const uint4* of_lane = lane_place; step < end; step += DEPTH, of_lane += 2 * DEPTH * stride)
      multiply(sum, tiles, step, to, plan.base, of_lane, stride);
    if (last) break;
  }

#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<float2*>(&sums[warp][tile][lane / 4 + 8 * half][lane % 4 * 2]) =
          make_float2(sum[tile][2 * half], sum[tile][2 * half + 1]);
  __syncthreads();
  if (written.writes) leave_product(a, factor, tiles, written, sums, squares, plan.planes, added);
}

// Warps of a block, of `groups` blocks that write `written` values each.
int warps_of(int groups, int written, int multiprocessors, int otherwise) {
  const int together = (groups + multiprocessors - 1) / multiprocessors, least = (written + 31) / 32;
  const int warps = together > MOST_WARPS ? otherwise : std::min(MOST_WARPS, RESIDENT_WARPS / together);
  return std::max(warps, least);
}

template <class F, int TILES>
int launch_quantized(const Products& products, int planes, StillStream stream) {
  constexpr int DEPTH = F::DEPTH / TILES;
  const StillSmallBatchProducts& a = products.all;
  const int each = a.gated ? 1 : TILES, matrices = a.gated ? 1 : a.count;
  int groups = 0, multiprocessors = 0;
  for (int i = 0; i < matrices; i++) groups += (row_tiles(products.factor[i].out) + each - 1) / each;
  if (const int error = count_multiprocessors(multiprocessors)) return error;
  // Where there are many blocks, those of few tiles are large, so that more warps wait for memory together; the others small, so
  // that some go on while one begins or ends.
  const int warps = warps_of(groups, each * TILE_ROWS * a.rows, multiprocessors, TILES == 1 ? 8 : 4);
  // Tiles that a warp may have, in whole rounds of the loop, or as many as are staged at a time.
  const int tile_bytes = 2 * a.rows * planes * BLOCK * 2, most = (column_tiles(a.inner) + warps - 1) / warps;
  int capacity = std::min(most, std::min(STAGED / warps, STAGED_BY_ALL / RESIDENT_WARPS) / tile_bytes);
  capacity = (capacity + DEPTH - 1) / DEPTH * DEPTH;
  return launch_early(quantized_products_kernel<F, TILES>, dim3(groups), warps * 32, warps * capacity * tile_bytes, stream, products,
                Plan{planes, capacity, BASE});
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
    // Of few tiles every one has a block, so that more warps wait for memory together. Of many two share what is staged.
    if (!a.gated && tiles < 2048) return launch_quantized<F, 1>(products, planes, stream);
    return launch_quantized<F, 2>(products, planes, stream);
  });
}

}  // namespace still
