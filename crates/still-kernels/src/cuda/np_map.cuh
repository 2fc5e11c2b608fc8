// The NP-Map on rows held in registers: phi = [softmax(u); softmax(-u)], u = |x| f / |f|.
#pragma once
#include "tile.cuh"

namespace still {

constexpr float MIN_NORM = 1e-12f;

// Squared norms of the two rows that a lane holds of a left operand.
template <int P, int KS>
__device__ __forceinline__ void squared_norms(const Left<P> (&x)[KS], float (&to)[2]) {
  to[0] = to[1] = 0.f;
#pragma unroll
  for (int k = 0; k < KS; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 v = unpack(x[k].r[0][i]);
      if constexpr (P == 2) {
        float2 low = unpack(x[k].r[1][i]);
        v.x += low.x;
        v.y += low.y;
      }
      to[i % 2] += v.x * v.x + v.y * v.y;
    }
  to[0] = row_sum(to[0]);
  to[1] = row_sum(to[1]);
}

// f = x W (sums, 16 x 8 NT) becomes softmax(u); `minus` becomes softmax(-u). `x_squared`: |x|^2 of the two rows.
template <int NT>
__device__ __forceinline__ void np_map(float (&f)[NT][4], float (&minus)[NT][4], const float (&x_squared)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float squares = 0.f, high = -INFINITY, low = INFINITY;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float x = f[n][half * 2 + i];
        squares += x * x;
        high = fmaxf(high, x);
        low = fminf(low, x);
      }
    float scale = sqrtf(x_squared[half]) / fmaxf(sqrtf(row_sum(squares)), MIN_NORM) * 1.4426950408889634f;
    float top = row_max(high) * scale, bottom = -row_max(-low) * scale;
    float up = 0.f, down = 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float u = f[n][half * 2 + i] * scale;
        up += f[n][half * 2 + i] = exp2_fast(u - top);
        down += minus[n][half * 2 + i] = exp2_fast(bottom - u);
      }
    up = 1.f / row_sum(up);
    down = 1.f / row_sum(down);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        f[n][half * 2 + i] *= up;
        minus[n][half * 2 + i] *= down;
      }
  }
}

}  // namespace still
