// The router self_recall: how badly the linear state recalls a token's value from its key, by one warp in f32.
#pragma once
#include "launch.cuh"
#include "np_map.cuh"
#include "values.cuh"

namespace still {

constexpr float MIN_RECALL = 1e-30f;  // an empty state recalls 0
constexpr int RECALLED = 4;           // rows that a warp works on together: what it loads of W and S serves all

template <bool MAX>
__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    const float y = __shfl_xor_sync(0xffffffffu, x, i);
    x = MAX ? fmaxf(x, y) : x + y;
  }
  return x;
}

// Places of a row that a lane has: column lane + 32 l in place l; and whether there is such a column.
template <int D>
constexpr int PLACES = (D + 31) / 32;
template <int D>
__device__ __forceinline__ bool has_place(int l) { return D % 32 == 0 || threadIdx.x % 32 + l * 32 < D; }

// y[c] += x[c] A for rows x[c] and A [D, D]: column lane + 32 l of a row is in place l of a lane.
template <int D, class E>
__device__ __forceinline__ void add_rows_times_matrix(const float (&x)[RECALLED][PLACES<D>], const E* a, float (&y)[RECALLED][PLACES<D>]) {
  constexpr int L = PLACES<D>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < L; i++)
#pragma unroll 4
    for (int j = 0; j < (i * 32 + 32 > D ? D % 32 : 32); j++) {
      const E* row = a + int64_t(i * 32 + j) * D + lane;
      float value[L];
#pragma unroll
      for (int l = 0; l < L; l++) value[l] = has_place<D>(l) ? to_f32(row[l * 32]) : 0.f;
#pragma unroll
      for (int c = 0; c < RECALLED; c++) {
        const float factor = __shfl_sync(0xffffffffu, x[c][i], j);
#pragma unroll
        for (int l = 0; l < L; l++) y[c][l] += factor * value[l];
      }
    }
}

// Features of rows of keys, softmax(u) and softmax(-u). Null rows are zeros.
template <class K>
__device__ __forceinline__ void map_rows(const typename K::T* const (&k)[RECALLED], const typename K::T* w, int flags,
                                         float (&plus)[RECALLED][PLACES<K::D>], float (&minus)[RECALLED][PLACES<K::D>]) {
  constexpr int D = K::D, L = PLACES<D>;
  const int lane = threadIdx.x % 32;
  float x[RECALLED][L];
#pragma unroll
  for (int c = 0; c < RECALLED; c++)
#pragma unroll
    for (int l = 0; l < L; l++) {
      x[c][l] = k[c] && has_place<D>(l) ? to_f32(k[c][lane + l * 32]) : 0.f;
      plus[c][l] = 0.f;
    }
  add_rows_times_matrix<D>(x, w, plus);
#pragma unroll
  for (int c = 0; c < RECALLED; c++) {
    float squared = 0.f, squares = 0.f, top = -INFINITY, bottom = -INFINITY, up = 0.f, down = 0.f;
#pragma unroll
    for (int l = 0; l < L; l++) {
      squared += x[c][l] * x[c][l];
      squares += plus[c][l] * plus[c][l];
    }
    squared = over_warp<false>(squared);
    squares = over_warp<false>(squares);
    const float stretch = flags & STILL_SOFTMAX_MAP ? 1.f : sqrtf(squared) / fmaxf(sqrtf(squares), MIN_NORM);
#pragma unroll
    for (int l = 0; l < L; l++) {
      plus[c][l] *= stretch;
      if (!has_place<D>(l)) continue;
      top = fmaxf(top, plus[c][l]);
      bottom = fmaxf(bottom, -plus[c][l]);
    }
    top = over_warp<true>(top);
    bottom = over_warp<true>(bottom);
#pragma unroll
    for (int l = 0; l < L; l++) {
      const float u = plus[c][l];
      up += plus[c][l] = has_place<D>(l) ? expf(u - top) : 0.f;
      down += minus[c][l] = has_place<D>(l) ? expf(-u - bottom) : 0.f;
    }
    up = 1.f / over_warp<false>(up);
    down = 1.f / over_warp<false>(down);
#pragma unroll
    for (int l = 0; l < L; l++) {
      plus[c][l] *= up;
      minus[c][l] *= down;
    }
  }
}

// || phi(k)'S / phi(k)'z - v ||^2 of each row, in all lanes. `s` [2D, D], `z` [2D].
template <class K>
__device__ __forceinline__ void recall_errors(const typename K::T* const (&k)[RECALLED], const typename K::T* const (&v)[RECALLED],
                                              const typename K::T* w, const float* s, const float* z, int flags, float (&error)[RECALLED]) {
  constexpr int D = K::D, L = PLACES<D>;
  const int lane = threadIdx.x % 32;
  float plus[RECALLED][L], minus[RECALLED][L], y[RECALLED][L];
  map_rows<K>(k, w, flags, plus, minus);
#pragma unroll
  for (int c = 0; c < RECALLED; c++) {
    float share = 0.f;
#pragma unroll
    for (int l = 0; l < L; l++) {
      if (has_place<D>(l)) share += plus[c][l] * z[lane + l * 32] + minus[c][l] * z[D + lane + l * 32];
      y[c][l] = 0.f;
    }
    error[c] = fmaxf(over_warp<false>(share), MIN_RECALL);  // for now the denominator
  }
  add_rows_times_matrix<D>(plus, s, y);
  add_rows_times_matrix<D>(minus, s + D * D, y);
#pragma unroll
  for (int c = 0; c < RECALLED; c++) {
    float sum = 0.f;
#pragma unroll
    for (int l = 0; l < L; l++) {
      const float recalled = flags & STILL_NO_LINEAR ? 0.f : y[c][l] / error[c];
      const float off = recalled - (v[c] && has_place<D>(l) ? to_f32(v[c][lane + l * 32]) : 0.f);
      sum += off * off;
    }
    error[c] = over_warp<false>(sum);
  }
}

}  // namespace still
