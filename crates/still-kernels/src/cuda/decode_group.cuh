// Exact attention of one token for the query heads of a KV head, which are the rows of a product: what the hybrid's decoding shares
// with that of a dense cache. Keys and values come in tiles of 64 each, of whose keys every one of four warps has 16.
#pragma once
#include "codes_ahead.cuh"
#include "online_softmax.cuh"
#include "rotate_step.cuh"

namespace still {

constexpr int GROUP = 16;  // query heads of a product, at most
constexpr int DECODE_THREADS = 128, DECODE_WARPS = DECODE_THREADS / 32;

// The group's `heads` queries, `stride` apart, to the rows of their tile after RoPE; zeros to the other rows.
template <class T, class TILE>
__device__ __forceinline__ void rotate_queries(TILE to, const T* q, int64_t stride, int heads, const StepRope& rope) {
  constexpr int PIECES = TILE::COLS / EIGHT;
  for (int i = threadIdx.x; i < GROUP * PIECES; i += DECODE_THREADS) {
    const int row = i / PIECES, col = i % PIECES * EIGHT;
    float x[EIGHT] = {};
    if (row < heads) rotate_piece(x, q + row * stride, col, rope);
    store_eight(to, row, col, x);
  }
}

// The same as keys are before they are coded, so that they meet codes of keys: times `key_scale` (null: ones), and in 4 bits rotated
// by groups of channels. A warp has a row.
template <class T, class TILE>
__device__ __forceinline__ void transform_queries(TILE to, const T* q, int64_t stride, int heads, const StepRope& rope,
                                                  const float* key_scale, bool rotated) {
  constexpr int D = TILE::COLS;
  for (int row = threadIdx.x / 32; row < GROUP; row += DECODE_WARPS) {
    WarpRow<code_groups(D)> x = {};
    if (row < heads) x.load_by(D, [&](int channel) { return rotated_value(q + row * stride, channel, rope); });
    if (key_scale) x.multiply(key_scale, D);
    if (rotated) x.rotate(D);
    x.store_by(D, [&](int channel, float value) { store_one(to, row, channel, value); });
  }
}

// A warp's products of queries and keys become weights. `logit(x, row, key)`: the logit of a product, in base 2; -INFINITY where the
// query does not see the key.
template <int NT, class Logit>
__device__ __forceinline__ void weigh_keys(OnlineSoftmax<NT>& rows, float (&products)[2][4], Logit logit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int key = warp * 16 + n * 8 + lane % 4 * 2 + e;
        products[n][half * 2 + e] = logit(products[n][half * 2 + e], lane / 4 + half * 8, key);
      }
    // A warp may have seen no key yet.
    const float raised = fmaxf(rows.m[half], row_top(products, half));
    const bool any = raised > -INFINITY;
    rescale(rows.out, rows.sum[half], half, any ? exp2_fast(rows.m[half] - raised) : 1.f);
    rows.m[half] = raised;
    add_weights(products, rows.sum[half], half, [&](float x) { return any ? exp2_fast(x - raised) : 0.f; });
  }
}

// Weights for values that are codes without their scales: times those of the tile's 64.
__device__ __forceinline__ void scale_weights(float (&weights)[2][4], const float* scales) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) weights[n][e] *= scales[warp * 16 + n * 8 + lane % 4 * 2 + e % 2];
}

// Adds a warp's values of a tile, by their weights.
template <int NT, class TILE>
__device__ __forceinline__ void add_values(OnlineSoftmax<NT>& rows, const float (&weights)[2][4], TILE tile) {
  Left<TILE::P> left[1];
  to_left(left[0], weights[0], weights[1]);
  product_nn<1, NT>(rows.out, left, tile, CHUNK + threadIdx.x / 32 * 16);
}

// The largest logits and the sums of the four warps, by row. Shared memory. CHECKED: by a test, a warp that saw no key counts for
// nothing; otherwise because its weight is exp2(-INFINITY), which takes a block that saw a key for every row.
template <bool CHECKED>
struct WarpStats {
  float maxima[DECODE_WARPS][GROUP], sums[DECODE_WARPS][GROUP];

  // A barrier is to come before they are read.
  template <int NT>
  __device__ __forceinline__ void leave(const OnlineSoftmax<NT>& mine) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float row_sums[2] = {row_sum(mine.sum[0]), row_sum(mine.sum[1])};
    if (lane % 4 == 0)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        maxima[warp][lane / 4 + half * 8] = mine.m[half];
        sums[warp][lane / 4 + half * 8] = row_sums[half];
      }
  }
  __device__ __forceinline__ float largest(int row) const {
    return fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row]));
  }
  static __device__ __forceinline__ bool counts(float own) { return !CHECKED || own > -INFINITY; }
  __device__ __forceinline__ float sum(int row, float largest) const {
    float all = 0.f;
    for (int w = 0; w < DECODE_WARPS; w++) all += counts(maxima[w][row]) ? sums[w][row] * exp2f(maxima[w][row] - largest) : 0.f;
    return all;
  }
  // The warp's numerators, brought to the block's largest logits, to `heads` rows that lie `stride` floats apart.
  template <int NT>
  __device__ __forceinline__ void leave_numerators(const OnlineSoftmax<NT>& mine, int heads, float* to, int stride) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane / 4 + half * 8;
      if (row >= heads) continue;
      const float weight = counts(mine.m[half]) ? exp2f(mine.m[half] - largest(row)) : 0.f;
      float* const own = to + row * stride + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; n++) store_pair(own + n * 8, mine.out[n][half * 2] * weight, mine.out[n][half * 2 + 1] * weight);
    }
  }
};

}  // namespace still
