// Tiles of a matrix in a block format on their way to registers, and their products with x.
#pragma once
#include "early.cuh"
#include "quantized.cuh"
#include "small_batch.cuh"

namespace still {

// What a warp has of a row of tiles or of TILES of them: codes and scales of DEPTH column tiles are on their way at once.
template <class F, int TILES>
struct TileStream {
  static constexpr int DEPTH = F::DEPTH / TILES;
  TileRow<F> rows[TILES];
  typename F::Codes codes[TILES][DEPTH];
  typename F::Scales scales[TILES][DEPTH];

  // Begins at column tile `from`. Where the activation is gated, the second row of tiles is of the second matrix. Rows past the last
  // are read, not written.
  __device__ __forceinline__ TileStream(const Products& products, const StillFactor& factor, int first, int from) {
    const StillSmallBatchProducts& a = products.all;
    const int last = row_tiles(factor.out) - 1;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int at = first + (a.gated ? 0 : tile);
      rows[tile] = TileRow<F>(a.gated && tile ? products.factor[1].weight : factor.weight, factor.out, a.inner, at < last ? at : last);
    }
    skip(from);
  }
  // Addresses go on by whole rounds; within one they differ by constants.
  __device__ __forceinline__ void skip(int64_t steps) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      rows[tile].codes += steps * F::CODES;
      rows[tile].scales += steps * F::SCALES;
    }
  }
  // Column tile `step`, `ahead` of where the stream is, to place `at`.
  __device__ __forceinline__ void load(int at, int ahead, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      F::load(codes[tile][at], rows[tile].codes + ahead * F::CODES, lane);
      F::load(scales[tile][at], rows[tile], ahead, step, lane);
    }
  }
  // Brings `count` column tiles behind those in registers to the second-level cache.
  __device__ __forceinline__ void prefetch(int count) const {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      prefetch_lines(rows[tile].codes + DEPTH * F::CODES, count * F::CODES * 4);
      prefetch_lines(rows[tile].scales + DEPTH * F::SCALES, count * F::SCALES * 4);
    }
  }
};

// sum += a block of 32 columns of a tile times x: `i` is the tile's place in the stream, `of_x` x's sums over the block where codes
// stand for values with an offset.
template <class F, int TILES>
__device__ __forceinline__ void add_block(float (&sum)[4], const TileStream<F, TILES>& tiles, int tile, int i, int block, uint32_t base, uint4 x,
                                          const float (&of_x)[4]) {
  Fragments weights;
  F::fragments(tiles.codes[tile][i], block, base, weights);
  float product[4] = {};
  auto scaled = [&](int half) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      sum[k] += F::scale(tiles.scales[tile][i], k / 2, block, half) * product[k];
      product[k] = 0.f;
    }
  };
  if constexpr (F::GROUP == 0) {
    mma(sum, weights[0], x.x, x.y);
    mma(sum, weights[1], x.z, x.w);
  } else {
    mma(product, weights[0], x.x, x.y);
    if constexpr (F::GROUP == 16) scaled(0);
    mma(product, weights[1], x.z, x.w);
    scaled(1);
  }
  if constexpr (F::OFFSET)
#pragma unroll
    for (int k = 0; k < 4; k++) sum[k] += F::offset(tiles.scales[tile][i], k / 2, block) * of_x[k];
}

// A round of the stream: DEPTH column tiles from `step` on, of those before `to`, times x as it is staged, from the lane's place on;
// what comes DEPTH later is loaded in their place.
template <class F, int TILES>
__device__ __forceinline__ void multiply(float (&sum)[TILES][4], TileStream<F, TILES>& tiles, int step, int to, uint32_t base, const uint4* of_lane,
                                         int stride) {
  constexpr int DEPTH = TileStream<F, TILES>::DEPTH;
#pragma unroll
  for (int i = 0; i < DEPTH; i++) {
    if (step + i >= to) break;
#pragma unroll
    for (int block = 0; block < 2; block++) {
      const uint4 x = of_lane[(i * 2 + block) * stride];
      float of_x[4] = {};
      if constexpr (F::OFFSET) {  // the sum of x over the block, in the registers where the products are
        const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
        mma(of_x, ones, x.x, x.y);
        mma(of_x, ones, x.z, x.w);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) add_block(sum[tile], tiles, tile, i, block, base, x, of_x);
    }
    if (step + i + DEPTH < to) tiles.load(i, i + DEPTH, step + i + DEPTH);
  }
  tiles.skip(DEPTH);
}

}  // namespace still
