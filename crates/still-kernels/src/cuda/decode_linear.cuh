// The linear branch of one token: a block makes half of phi(q) S and phi(q) z of one query head, times lambda.
#pragma once
#include "decode_block.cuh"

namespace still {

// Sum, or largest, over the block's 128 threads.
template <bool MAX>
__device__ __forceinline__ float over_block(float x, float* four) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    float y = __shfl_xor_sync(0xffffffffu, x, i);
    x = MAX ? fmaxf(x, y) : x + y;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) four[threadIdx.x / 32] = x;
  __syncthreads();
  return MAX ? fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])) : four[0] + four[1] + four[2] + four[3];
}

// y[N] = x[M] A, A [M, N] of 16-byte pieces of E elements; y and x in shared memory. All 128 threads call.
template <int M, int N, class E>
__device__ __forceinline__ void row_times_matrix(const float* x, const E* a, float* y) {
  constexpr int WIDE = 16 / sizeof(E), PIECES = N / WIDE, LANES = 128 / PIECES;
  const int piece = threadIdx.x % PIECES, lane = threadIdx.x / PIECES;
  for (int i = threadIdx.x; i < N; i += 128) y[i] = 0.f;
  float sum[WIDE];
#pragma unroll
  for (int e = 0; e < WIDE; e++) sum[e] = 0.f;
  if (lane < LANES)
#pragma unroll 16
    for (int m = lane; m < M; m += LANES) {
      const uint4 raw = *reinterpret_cast<const uint4*>(a + int64_t(m) * N + piece * WIDE);
      const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (sizeof(E) == 2) {
          float2 v = unpack(word[w]);
          sum[2 * w] += x[m] * v.x;
          sum[2 * w + 1] += x[m] * v.y;
        } else {
          sum[w] += x[m] * __uint_as_float(word[w]);
        }
      }
    }
  for (int turn = 0; turn < LANES; turn++) {  // in order
    __syncthreads();
    if (lane == turn)
#pragma unroll
      for (int e = 0; e < WIDE; e++) y[piece * WIDE + e] += sum[e];
  }
  __syncthreads();
}

// Leaves the block's share of numerator and denominator in `to`: the features of softmax(u), or those of softmax(-u).
template <class K>
__device__ __forceinline__ void attend_state(const Decode<typename K::T>& in, const Place& at, const DecodeMemory<K>& memory,
                                             DecodeScratch<K::D>& scratch, float* to) {
  constexpr int D = K::D;
  static_assert(2 * DecodeMemory<K>::Stage::BYTES >= D * D * 4);
  const int g = (at.part - at.ring_part - 1) / 2, head = at.kv * in.group + g;
  const bool plus = at.part % 2 == (at.ring_part + 1) % 2, on = threadIdx.x < D;
  if (at.absorbed == 0) {
    if (on) to[threadIdx.x] = 0.f;
    if (threadIdx.x == 0) to[GROUP * D] = 0.f;
    return;
  }
  // The state's half comes while phi is made.
  const float* s = in.s + (at.bk * 2 + !plus) * D * D;
  for (int i = threadIdx.x; i < D * D / 4; i += 128) copy_async(memory.base + i * 16, s + i * 4, true);
  copy_commit();
  const float lambda = linear_scale(in.log_scale, in.flags, head, at.absorbed);
  const float own = on ? rotated_value(in.q.row(at.b, head, 0), threadIdx.x, in.cosines(at.b), in.sines(at.b), in.half) : 0.f;
  const float z = on ? in.z[(at.bk * 2 + !plus) * D + threadIdx.x] : 0.f;
  if (on) scratch.x[threadIdx.x] = own;
  __syncthreads();
  row_times_matrix<D, D>(scratch.x, in.w_q + int64_t(head) * D * D, scratch.f);
  const float value = on ? scratch.f[threadIdx.x] : 0.f;
  float* const four = scratch.four;
  const float squared = over_block<false>(own * own, four), norm = sqrtf(over_block<false>(value * value, four));
  const float stretch = in.flags & STILL_SOFTMAX_MAP ? 1.f : sqrtf(squared) / fmaxf(norm, 1e-12f);
  const float u = value * stretch * (plus ? LOG2E : -LOG2E);
  const float top = over_block<true>(on ? u : -INFINITY, four), e = on ? exp2f(u - top) : 0.f;
  const float share = lambda * e / over_block<false>(e, four);
  if (on) scratch.phi[threadIdx.x] = share;
  const float den = over_block<false>(share * z, four);
  copy_wait<0>();
  __syncthreads();
  row_times_matrix<D, D>(scratch.phi, static_cast<const float*>(memory.floats), scratch.y);
  if (on) to[threadIdx.x] = scratch.y[threadIdx.x];
  if (threadIdx.x == 0) to[GROUP * D] = den;
}

}  // namespace still
