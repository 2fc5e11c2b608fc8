// x on its way to shared memory, as the products with matrices in block formats take it: in bf16 planes, columns where the lanes that
// multiply by them read.
#pragma once
#include <type_traits>
#include "quantized.cuh"
#include "small_batch.cuh"

namespace still {

__device__ __forceinline__ void widen(const uint4 (&from)[1], float (&to)[8]) {
  const uint32_t word[4] = {from[0].x, from[0].y, from[0].z, from[0].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 two = unpack(word[i]);
    to[2 * i] = two.x, to[2 * i + 1] = two.y;
  }
}
__device__ __forceinline__ void widen(const uint4 (&from)[2], float (&to)[8]) {
  const uint32_t word[8] = {from[0].x, from[0].y, from[0].z, from[0].w, from[1].x, from[1].y, from[1].z, from[1].w};
#pragma unroll
  for (int i = 0; i < 8; i++) to[i] = __uint_as_float(word[i]);
}

// Columns from .. to of a row of x into shared memory, by one warp; returns the lane's part of sum(x^2) if there is a norm.
template <class X, bool NORM>
__device__ __forceinline__ float stage_row(const X* x, const X* norm, int inner, int from, int to, int planes, int row, int columns,
                                           uint2* staged) {
  // Eights of columns that are loaded together: none waits for another.
  constexpr int WORDS = sizeof(X) / 2, EIGHTS = 4 / WORDS;
  float square = 0.f;
  for (int first = from + threadIdx.x % 32 * 8; first < to; first += EIGHTS * 32 * 8) {
    uint4 loaded[EIGHTS][WORDS], by[EIGHTS][WORDS];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int at = first + e * 32 * 8;
      const bool there = at < to && at < inner;
#pragma unroll
      for (int w = 0; w < WORDS; w++) {
        loaded[e][w] = there ? reinterpret_cast<const uint4*>(x + at)[w] : make_uint4(0, 0, 0, 0);
        if (NORM) by[e][w] = there ? __ldg(reinterpret_cast<const uint4*>(norm + at) + w) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int at = first + e * 32 * 8;
      if (at >= to) break;
      float value[8];
      widen(loaded[e], value);
      if (NORM) {
        float scale[8];
        widen(by[e], scale);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          square += value[i] * value[i];
          value[i] *= scale[i];
        }
      }
      // Each four columns go to the lanes that multiply by them: [block][column of the product][t][half].
      const int block = (at - from) / BLOCK, four = at % BLOCK / 4;
      uint2* const place = staged + (block * columns + row * planes) * 8 + four % 4 * 2 + four / 4;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float* v = value + 4 * i;
        const uint2 high = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
        place[2 * i] = high;
        if (planes == 2) {
          const float2 a = unpack(high.x), b = unpack(high.y);
          place[8 + 2 * i] = make_uint2(pack(v[0] - a.x, v[1] - a.y), pack(v[2] - b.x, v[3] - b.y));
        }
      }
    }
  }
  return square;
}

// Columns of x in column tiles step..end, of all rows, to the warp's part of shared memory. `squares`: the warp's sums of x^2 by row,
// which begin with the `first` part; used if there is a norm.
__device__ __forceinline__ void stage(const StillSmallBatchProducts& a, int step, int end, bool first, int planes, float* squares, uint2* own) {
  __syncwarp();
  for (int row = 0; row < a.rows; row++) {
    auto of = [&](auto type, auto normed) {
      using X = decltype(type);
      return stage_row<X, decltype(normed)::value>(static_cast<const X*>(a.x) + int64_t(row) * a.inner, static_cast<const X*>(a.norm), a.inner,
                                                   step * TILE_COLUMNS, end * TILE_COLUMNS, planes, row, a.rows * planes, own);
    };
    if (a.norm) {
      const std::true_type normed;
      const float square = warp_sum(a.dtype == STILL_F32 ? of(float{}, normed) : of(__nv_bfloat16{}, normed));
      if (threadIdx.x % 32 == 0) squares[row] = first ? square : squares[row] + square;
    } else {
      const std::false_type plain;
      a.dtype == STILL_F32 ? of(float{}, plain) : of(__nv_bfloat16{}, plain);
    }
  }
  __syncwarp();
}

}  // namespace still
