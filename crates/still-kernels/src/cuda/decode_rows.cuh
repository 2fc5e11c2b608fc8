// The exact branch of one token: a block attends to its share of the store, or to the ring, for the KV head's group of queries.
#pragma once
#include "decode_block.cuh"
#include "online_softmax.cuh"

namespace still {

// The keys and values of one block, in tiles `begin..end` of 64: of the store, or the ring's two chunks (the one before, this one).
template <class K>
struct RowShare {
  using T = typename K::T;
  const Decode<T>& in;
  const Place& at;
  bool ring;
  int begin, end;

  __device__ __forceinline__ RowShare(const Decode<T>& in, const Place& at) : in(in), at(at), ring(at.part == at.ring_part) {
    begin = ring ? (at.chunk == 0) : at.part * at.share;
    end = ring ? 2 : min(begin + at.share, at.tiles);
  }
  __device__ __forceinline__ int valid(int i) const {
    return ring ? (i == 0 ? CHUNK : at.position % CHUNK + 1) : at.kept - i * CHUNK;
  }
  // Copies tile i to rows 0..64 (keys) and 64..128 (values), and commits.
  template <class STAGE>
  __device__ __forceinline__ void load(int i, STAGE to) const {
    if (i < end) {
      const int64_t from = ring ? at.bk * RING + (at.chunk + 1 + i) % 2 * CHUNK : in.store(at.b, at.kv) + int64_t(i) * CHUNK;
      load_matrix<128, CHUNK>(to, 0, (ring ? in.ring_k : in.store_k) + from * K::D, K::D, valid(i));
      load_matrix<128, CHUNK>(to, CHUNK, (ring ? in.ring_v : in.store_v) + from * K::D, K::D, valid(i));
    }
    copy_commit();
  }
};

// Adds the token to the ring, before the ring is read.
template <class K>
__device__ __forceinline__ void enter_ring(const Decode<typename K::T>& in, const Place& at, float* window) {
  const int64_t to = (at.bk * RING + at.position % RING) * K::D;
  if (threadIdx.x < K::D) {
    in.ring_k[to + threadIdx.x] = in.k.row(at.b, at.kv, 0)[threadIdx.x];
    in.ring_v[to + threadIdx.x] = in.v.row(at.b, at.kv, 0)[threadIdx.x];
  }
  for (int i = threadIdx.x; i < in.group * RING; i += 128) window[i] = -INFINITY;
  __syncthreads();
}

// What a warp has of the rows of its lanes: numerators, largest logits (in base 2) and sums.
template <int NT>
struct RowSums {
  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// Attends to the block's tiles, a warp to 16 keys of each. Logits over the ring stay, for the score.
template <class K>
__device__ __forceinline__ void attend_rows(const Decode<typename K::T>& in, const Place& at, const DecodeMemory<K>& memory,
                                            RowSums<K::D / 8>& mine) {
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowShare<K> share(in, at);
  float* const window = memory.window();
  if (share.ring) enter_ring<K>(in, at, window);
  load_matrix<128, 16>(memory.queries(), 0, in.q.row(at.b, at.kv * in.group, 0), in.q.head, in.group);
  share.load(share.begin, memory.stage(share.begin));
  Left<P> q[KS];
  clear(mine.out);
  const float scale = rsqrtf(float(D)) * LOG2E;
  const bool hidden = share.ring && in.flags & STILL_NO_WINDOW;  // all but the token itself
  for (int i = share.begin; i < share.end; i++) {
    copy_wait<0>();
    __syncthreads();
    share.load(i + 1, memory.stage(i + 1));
    if (i == share.begin)
#pragma unroll
      for (int k = 0; k < KS; k++) load_left(q[k], memory.queries(), 0, k * 16);
    float s[2][4];
    clear(s);
    product_nt<KS, 2>(s, q, memory.stage(i), warp * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane / 4 + half * 8;
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int key = warp * 16 + n * 8 + lane % 4 * 2 + e;
          float& l = s[n][half * 2 + e];
          l = key < share.valid(i) ? l * scale : -INFINITY;
          if (share.ring && row < in.group) window[row * RING + i * CHUNK + key] = l;
          if (hidden && !(i == 1 && key == at.position % CHUNK)) l = -INFINITY;
        }
      // A warp may have seen no key yet.
      const float raised = fmaxf(mine.m[half], row_top(s, half));
      const bool any = raised > -INFINITY;
      rescale(mine.out, mine.sum[half], half, any ? exp2_fast(mine.m[half] - raised) : 1.f);
      mine.m[half] = raised;
      add_weights(s, mine.sum[half], half, [&](float l) { return any ? exp2_fast(l - raised) : 0.f; });
    }
    Left<P> p[1];
    to_left(p[0], s[0], s[1]);
    product_nn<1, NT>(mine.out, p, memory.stage(i), CHUNK + warp * 16);
  }
}

// Four warps' sums to one, which the block leaves in `to`: brought to the block's maximum, added in order.
template <class K>
__device__ __forceinline__ void merge_warps(const RowSums<K::D / 8>& mine, int group, float* numerators, DecodeScratch<K::D>& scratch,
                                            float* to) {
  constexpr int D = K::D, NT = D / 8;
  auto &maxima = scratch.maxima, &sums = scratch.sums;
  auto largest = [&](int row) { return fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row])); };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float row_sums[2] = {row_sum(mine.sum[0]), row_sum(mine.sum[1])};
  if (lane % 4 == 0)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      maxima[warp][lane / 4 + half * 8] = mine.m[half];
      sums[warp][lane / 4 + half * 8] = row_sums[half];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * D; i += 128) numerators[i] = 0.f;
  const float top[2] = {largest(lane / 4), largest(lane / 4 + 8)};
  for (int turn = 0; turn < 4; turn++) {
    __syncthreads();
    if (warp == turn)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float weight = mine.m[half] > -INFINITY ? exp2f(mine.m[half] - top[half]) : 0.f;
        float* row = numerators + (lane / 4 + half * 8) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          row[n * 8] += mine.out[n][half * 2] * weight;
          row[n * 8 + 1] += mine.out[n][half * 2 + 1] * weight;
        }
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * D; i += 128) to[i] = numerators[i];
  if (threadIdx.x < group) {
    const int row = threadIdx.x;
    const float m = largest(row);
    float all = 0.f;
    for (int w = 0; w < 4; w++) all += maxima[w][row] > -INFINITY ? sums[w][row] * exp2f(maxima[w][row] - m) : 0.f;
    to[GROUP * D + row] = m;
    to[GROUP * (D + 1) + row] = all;
  }
}

}  // namespace still
