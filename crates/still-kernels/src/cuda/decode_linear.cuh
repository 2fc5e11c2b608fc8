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

// Sums of both over the block's 128 threads.
__device__ __forceinline__ void sums_over_block(float& x, float& y, float* four, float* others) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, i);
    y += __shfl_xor_sync(0xffffffffu, y, i);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) four[threadIdx.x / 32] = x, others[threadIdx.x / 32] = y;
  __syncthreads();
  x = four[0] + four[1] + four[2] + four[3];
  y = others[0] + others[1] + others[2] + others[3];
}

// Channels of a row that a thread has: that of its number, and the 128th after it if there are as many.
template <int D>
constexpr int OWN = (D + 127) / 128;

// A matrix [M, N] in pieces of 16 bytes of its rows, by the threads that multiply by them: a thread has a piece of every LANES-th row.
template <int M, int N, class E>
struct MatrixPieces {
  static constexpr int WIDE = 16 / sizeof(E), PIECES = N / WIDE, LANES = 128 / PIECES, EACH = (M + LANES - 1) / LANES;
  static_assert(LANES * N <= 1024);
  const int piece = threadIdx.x % PIECES, lane = threadIdx.x / PIECES;

  __device__ __forceinline__ bool has(int i) const { return lane < LANES && lane + i * LANES < M; }
  __device__ __forceinline__ uint4 load(const E* a, int i) const {
    return has(i) ? *reinterpret_cast<const uint4*>(a + int64_t(lane + i * LANES) * N + piece * WIDE) : make_uint4(0, 0, 0, 0);
  }
  // sum += x A of a row.
  __device__ __forceinline__ void add(float (&sum)[WIDE], const float* x, uint4 raw, int i) const {
    const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
    const float by = has(i) ? x[lane + i * LANES] : 0.f;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if constexpr (sizeof(E) == 2) {
        const float2 v = unpack(word[w]);
        sum[2 * w] += by * v.x;
        sum[2 * w + 1] += by * v.y;
      } else {
        sum[w] += by * __uint_as_float(word[w]);
      }
    }
  }
  // The thread's columns, from `LANES * N` floats in shared memory. All 128 threads call.
  __device__ __forceinline__ void columns(float (&y)[OWN<N>], const float (&sum)[WIDE], float* lanes) const {
    if (lane < LANES)
#pragma unroll
      for (int e = 0; e < WIDE; e++) lanes[lane * N + piece * WIDE + e] = sum[e];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < OWN<N>; j++) {
      const int c = threadIdx.x + j * 128;
      y[j] = 0.f;
      if (c < N)
#pragma unroll
        for (int l = 0; l < LANES; l++) y[j] += lanes[l * N + c];
    }
  }
};

// A thread's channels of a row.
__device__ __forceinline__ int channel(int j) { return int(threadIdx.x) + j * 128; }
template <int D>
__device__ __forceinline__ bool has_channel(int j) { return channel(j) < D; }

// A head that has absorbed nothing has no share.
template <int D>
__device__ __forceinline__ void leave_nothing(float* to) {
#pragma unroll
  for (int j = 0; j < OWN<D>; j++)
    if (has_channel<D>(j)) to[channel(j)] = 0.f;
  if (threadIdx.x == 0) to[GROUP * D] = 0.f;
}

// A block's work: which query head, and which half of its features, those of softmax(u) (`plus`) or those of softmax(-u).
template <class K>
struct HeadHalf {
  static constexpr int D = K::D;
  // A wider map and state are read when they are multiplied.
  static constexpr bool AHEAD = DecodeMemory<K>::HAS_STATE;
  const Decode<typename K::T>& in;
  int head;
  bool plus;
  int64_t half;  // of the states

  __device__ __forceinline__ HeadHalf(const Decode<typename K::T>& in, const Place& at)
      : in(in), head(at.kv * in.group + (at.part - at.ring_part - 1) / 2), plus(at.part % 2 == (at.ring_part + 1) % 2), half(at.bk * 2 + !plus) {}
  __device__ __forceinline__ const float* s() const { return in.s + half * D * D; }
  __device__ __forceinline__ const float* z() const { return in.z + half * D; }
  __device__ __forceinline__ const typename K::T* map() const { return in.w_q + int64_t(head) * D * D; }
  // Commits.
  __device__ __forceinline__ void load_state(uint32_t to) const {
    const float* const from = s();
    for (int i = threadIdx.x; AHEAD && i < D * D / 4; i += 128) copy_async(to + i * 16, from + i * 4, true);
    copy_commit();
  }
};

// From the thread's channels of x W (`value`), x (`own`) and z: numerators of softmax(u) or softmax(-u) to `scratch.phi`. Returns
// their sum, and that of their products with z.
template <int D>
__device__ __forceinline__ float2 make_features(float (&value)[OWN<D>], const float (&own)[OWN<D>], const float (&z)[OWN<D>], bool plus, int flags,
                                                DecodeScratch<D>& scratch) {
  float squared = 0.f, norm = 0.f;
#pragma unroll
  for (int j = 0; j < OWN<D>; j++) {
    squared += own[j] * own[j];
    norm += value[j] * value[j];
  }
  sums_over_block(squared, norm, scratch.four, scratch.others);
  const float stretch = flags & STILL_SOFTMAX_MAP ? 1.f : sqrtf(squared) / fmaxf(sqrtf(norm), 1e-12f);
  float top = -INFINITY, sum = 0.f, den = 0.f;
#pragma unroll
  for (int j = 0; j < OWN<D>; j++) {
    value[j] *= stretch * (plus ? LOG2E : -LOG2E);
    top = fmaxf(top, has_channel<D>(j) ? value[j] : -INFINITY);
  }
  top = over_block<true>(top, scratch.four);
#pragma unroll
  for (int j = 0; j < OWN<D>; j++) {
    const float e = has_channel<D>(j) ? exp2f(value[j] - top) : 0.f;
    if (has_channel<D>(j)) scratch.phi[channel(j)] = e;
    sum += e;
    den += e * z[j];
  }
  copy_wait<0>();  // of the state, before the sums' barrier
  sums_over_block(sum, den, scratch.four, scratch.others);
  return make_float2(sum, den);
}

// Leaves the block's share of numerator and denominator in `to`.
template <class K>
__device__ __forceinline__ void attend_state(const Decode<typename K::T>& in, const Place& at, const DecodeMemory<K>& memory,
                                             DecodeScratch<K::D>& scratch, float* to) {
  constexpr int D = K::D, EACH = OWN<D>;
  const HeadHalf<K> mine(in, at);
  constexpr bool AHEAD = mine.AHEAD;
  if (at.absorbed == 0) {
    wait_for_previous();
    return leave_nothing<D>(to);
  }
  // The state's half comes while phi is made.
  const bool settled = !retires(at.position);
  if (settled) mine.load_state(memory.base);
  const MatrixPieces<D, D, typename K::T> map;
  uint4 weights[AHEAD ? map.EACH : 1];
#pragma unroll
  for (int i = 0; AHEAD && i < map.EACH; i++) weights[i] = map.load(mine.map(), i);
  const float lambda = linear_scale(in.log_scale, in.flags, mine.head, at.absorbed);
  wait_for_previous();
  if (!settled) mine.load_state(memory.base);
  float own[EACH], z[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    own[j] = has_channel<D>(j) ? rotated_value(in.q.row(at.b, mine.head, 0), channel(j), in.rope(at.b)) : 0.f;
    z[j] = has_channel<D>(j) ? mine.z()[channel(j)] : 0.f;
    if (has_channel<D>(j)) scratch.x[channel(j)] = own[j];
  }
  __syncthreads();
  float mapped[map.WIDE] = {}, value[EACH];
  if constexpr (AHEAD) {
#pragma unroll
    for (int i = 0; i < map.EACH; i++) map.add(mapped, scratch.x, weights[i], i);
  } else {
#pragma unroll 8
    for (int i = 0; i < map.EACH; i++) map.add(mapped, scratch.x, map.load(mine.map(), i), i);
  }
  map.columns(value, mapped, memory.lane_sums());
  const float2 sums = make_features<D>(value, own, z, mine.plus, in.flags, scratch);
  const MatrixPieces<D, D, float> state;
  float numerators[state.WIDE] = {};
#pragma unroll 8
  for (int i = 0; i < state.EACH; i++) state.add(numerators, scratch.phi, state.load(AHEAD ? memory.floats : mine.s(), i), i);
  state.columns(value, numerators, memory.lane_sums());
  const float share = lambda / sums.x;
#pragma unroll
  for (int j = 0; j < EACH; j++)
    if (has_channel<D>(j)) to[channel(j)] = value[j] * share;
  if (threadIdx.x == 0) to[GROUP * D] = sums.y * share;
}

}  // namespace still
