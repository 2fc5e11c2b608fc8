// The feature maps on rows held in registers: phi = [softmax(u); softmax(-u)]; u = |x| f / |f| (NP-Map), or f (STILL_SOFTMAX_MAP).
#pragma once
#include "still.h"
#include "fragments.cuh"

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

// exp2(f scale - top) and exp2(bottom - f scale) are the numerators of softmax(u) and softmax(-u), f = x W (sums, 16 x 8 NT).
struct NpScale {
  float scale[2], top[2], bottom[2];  // of the two rows that a lane holds, in base 2
  bool clamped[2];                    // |f| is below its least value
};

template <int NT>
__device__ __forceinline__ NpScale np_scale(const float (&f)[NT][4], const float (&x_squared)[2], int flags) {
  NpScale u;
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
    const float norm = sqrtf(row_sum(squares));
    u.clamped[half] = norm <= MIN_NORM;
    u.scale[half] = (flags & STILL_SOFTMAX_MAP ? 1.f : sqrtf(x_squared[half]) / fmaxf(norm, MIN_NORM)) * LOG2E;
    u.top[half] = row_max(high) * u.scale[half];
    u.bottom[half] = -row_max(-low) * u.scale[half];
  }
  return u;
}

// f becomes softmax(u); `minus` becomes softmax(-u). `x_squared`: |x|^2 of the two rows.
template <int NT>
__device__ __forceinline__ void np_map(float (&f)[NT][4], float (&minus)[NT][4], const float (&x_squared)[2], int flags) {
  const NpScale u = np_scale(f, x_squared, flags);
  float up[2] = {0.f, 0.f}, down[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float x = f[n][e] * u.scale[e / 2];
      up[e / 2] += f[n][e] = exp2_fast(x - u.top[e / 2]);
      down[e / 2] += minus[n][e] = exp2_fast(u.bottom[e / 2] - x);
    }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    up[half] = 1.f / row_sum(up[half]);
    down[half] = 1.f / row_sum(down[half]);
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      f[n][e] *= up[e / 2];
      minus[n][e] *= down[e / 2];
    }
}

}  // namespace still
