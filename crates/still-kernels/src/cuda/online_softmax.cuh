// A softmax over logits that come a tile at a time. Of each of the two rows that a lane holds, a block keeps the largest logit
// so far (in base 2), the sum of the weights exp2(logit - largest), and the numerators, the sum of weights times values.
#pragma once
#include "fragments.cuh"

namespace still {

// What a lane has of its two rows.
template <int NT>
struct OnlineSoftmax {
  float out[NT][4];  // numerators; to be cleared
  float m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// The largest of a row's logits in a tile.
template <int N>
__device__ __forceinline__ float row_top(const float (&logits)[N][4], int half) {
  float top = -INFINITY;
#pragma unroll
  for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(logits[n][half * 2], logits[n][half * 2 + 1]));
  return row_max(top);
}

// What was added up for a row before its largest logit rose, times `shrink`, which is exp2(the largest before - the largest now).
template <int NT>
__device__ __forceinline__ void rescale(float (&numerators)[NT][4], float& sum, int half, float shrink) {
  sum *= shrink;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    numerators[n][half * 2] *= shrink;
    numerators[n][half * 2 + 1] *= shrink;
  }
}

// A row's logits become weights, whose sum is added.
template <int N, class Weight>
__device__ __forceinline__ void add_weights(float (&logits)[N][4], float& sum, int half, Weight weight) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float& x = logits[n][half * 2 + e];
      x = weight(x);
      sum += x;
    }
}

// Logits of a tile, in base 2 once they are multiplied by `scale`, become weights. Every row has a finite one by then. `see(half, top,
// rises)` is told of a row's largest logit in the tile and whether none before was as large.
template <int NT, int N, class See>
__device__ __forceinline__ void weigh(OnlineSoftmax<NT>& rows, float (&logits)[N][4], float scale, See see) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float top = row_top(logits, half), raised = fmaxf(rows.m[half], top * scale);
    see(half, top, raised > rows.m[half]);
    rescale(rows.out, rows.sum[half], half, exp2_fast(rows.m[half] - raised));
    rows.m[half] = raised;
    add_weights(logits, rows.sum[half], half, [&](float x) { return exp2_fast(x * scale - raised); });
  }
}

}  // namespace still
