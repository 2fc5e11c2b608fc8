// Gradients of the feature maps of 64 rows, by two warpgroups: each holds half of the columns, a warp 16 rows.
#pragma once
#include "np_map.cuh"

namespace still {

// Combines what the two halves of a row reduced to; all 256 threads of the block call.
struct RowHalves {
  using Buffer = float[2][2][CHUNK];  // [values][halves][rows]
  Buffer& buffer;                     // shared

  template <bool MAX, int COUNT>
  __device__ __forceinline__ void combine(float (&x)[COUNT][2]) {
    static_assert(COUNT <= 2);
    const int mine = threadIdx.x / 128, row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int c = 0; c < COUNT; c++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        x[c][half] = MAX ? row_max(x[c][half]) : row_sum(x[c][half]);
        if (threadIdx.x % 4 == 0) buffer[c][mine][row + half * 8] = x[c][half];
      }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COUNT; c++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float other = buffer[c][1 - mine][row + half * 8];
        x[c][half] = MAX ? fmaxf(x[c][half], other) : mine == 0 ? x[c][half] + other : other + x[c][half];
      }
    __syncthreads();
  }
};

// u of a lane's part of two rows, and what makes phi of it: numerators are exp2(u - top) and exp2(-u - bottom), u in base 2.
struct MapRows {
  float scale[2], ends[2][2], inverse[2][2];  // u / f; top, bottom; one over the sums of plus' and minus' numerators
  bool clamped[2];                            // |f| is below its least value

  // f = x W becomes u.
  template <int NT>
  __device__ __forceinline__ MapRows(RowHalves& rows, float (&f)[NT][4], const float (&x_squared)[2], bool keeps_norm) {
    float squares[1][2] = {{0.f, 0.f}};
    ends[0][0] = ends[0][1] = ends[1][0] = ends[1][1] = -INFINITY;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        squares[0][e / 2] += f[n][e] * f[n][e];
        ends[0][e / 2] = fmaxf(ends[0][e / 2], f[n][e]);
        ends[1][e / 2] = fmaxf(ends[1][e / 2], -f[n][e]);
      }
    rows.combine<false>(squares);
    rows.combine<true>(ends);
    float sums[2][2] = {{0.f, 0.f}, {0.f, 0.f}};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float norm = sqrtf(squares[0][half]);
      clamped[half] = norm <= MIN_NORM;
      scale[half] = (keeps_norm ? sqrtf(x_squared[half]) / fmaxf(norm, MIN_NORM) : 1.f) * LOG2E;
      ends[0][half] *= scale[half];
      ends[1][half] *= scale[half];
    }
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        f[n][e] *= scale[e / 2];
        sums[0][e / 2] += exp2_fast(f[n][e] - ends[0][e / 2]);
        sums[1][e / 2] += exp2_fast(-f[n][e] - ends[1][e / 2]);
      }
    rows.combine<false>(sums);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      inverse[0][half] = 1.f / sums[0][half];
      inverse[1][half] = 1.f / sums[1][half];
    }
  }
  // Part 0 (minus) or 1 (plus) of phi.
  __device__ __forceinline__ float phi(float u, int half, int part) const {
    return part ? exp2_fast(u - ends[0][half]) * inverse[0][half] : exp2_fast(-u - ends[1][half]) * inverse[1][half];
  }
};

// The gradient of u, from those of phi's parts: du = p+ (d+ - p+ . d+) - p- (d- - p- . d-). `inner`: phi . dphi.
template <int NT, class Take, class Share>
__device__ __forceinline__ void softmaxes_backward(RowHalves& rows, const MapRows& map, const float (&u)[NT][4], Take take, Share share,
                                                   float (&inner)[2], float (&du)[NT][4]) {
  inner[0] = inner[1] = 0.f;
#pragma unroll
  for (int part = 0; part < 2; part++) {
    float d[NT][4], mean[1][2] = {{0.f, 0.f}};
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) d[n][e] = map.phi(u[n][e], e / 2, part);
    take(d, part);
    share(d, part);
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) mean[0][e / 2] += map.phi(u[n][e], e / 2, part) * d[n][e];
    rows.combine<false>(mean);
    inner[0] += mean[0][0];
    inner[1] += mean[0][1];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float x = map.phi(u[n][e], e / 2, part) * (d[n][e] - mean[0][e / 2]);
        du[n][e] = part ? du[n][e] + x : -x;
      }
  }
}

// f = x W comes in and df goes out. `take(phi, part)` sees phi's part 0 (minus) or 1 (plus) before `share(d, part)` makes the
// gradient of that part. `inner`: phi . dphi; `radial`: what of x goes into dx beside df Wt.
template <int NT, class Take, class Share>
__device__ __forceinline__ void np_map_backward(RowHalves& rows, float (&f)[NT][4], const float (&x_squared)[2], int flags, Take take,
                                                Share share, float (&inner)[2], float (&radial)[2]) {
  const bool keeps_norm = !(flags & STILL_SOFTMAX_MAP);
  const MapRows map(rows, f, x_squared, keeps_norm);
  float du[NT][4];
  softmaxes_backward(rows, map, f, take, share, inner, du);
  // u = |x| g, g = f / |f|: df = (|x| / |f|) (du - g (g . du)), the last term only above the clamp; d|x| = g . du. Or u = f.
  float dot[1][2] = {{0.f, 0.f}};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) dot[0][e / 2] += f[n][e] * du[n][e];
  rows.combine<false>(dot);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float inverse = keeps_norm && x_squared[half] > 0.f ? 1.f / x_squared[half] : 0.f;
    radial[half] = dot[0][half] * inverse / LOG2E;
    const float along = map.clamped[half] ? 0.f : radial[half] / LOG2E;
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& x = f[n][half * 2 + e];
        x = map.scale[half] / LOG2E * (du[n][half * 2 + e] - x * along);
      }
  }
}

// Squared norms of the two rows that a lane holds of a tile of 64.
template <class TILE>
__device__ __forceinline__ void squared_norms(TILE tile, float (&to)[2]) {
  to[0] = to[1] = 0.f;
#pragma unroll
  for (int k = 0; k < TILE::COLS / 16; k++) {
    Left<TILE::P> x[1];
    float part[2];
    load_left(x[0], tile, threadIdx.x / 32 % 4 * 16, k * 16);
    squared_norms(x, part);
    to[0] += part[0];
    to[1] += part[1];
  }
}

}  // namespace still
