// The exact branch of one token: a block attends to its share of the store, or to the ring, for the KV head's group of queries.
#pragma once
#include "decode_block.cuh"

namespace still {

// The keys and values of one block, in tiles `begin..end` of 64: of the store, or the ring's two chunks (the one before, this one).
template <class K, int CODING>
struct RowShare {
  using T = typename K::T;
  const Stored<T>& in;
  const Place& at;
  bool ring;
  bool channels;  // whether keys of the store are coded by channel
  int begin, end;
  CodesAhead<K, CODING> ahead;

  __device__ __forceinline__ RowShare(const Stored<T>& in, const Place& at) : in(in), at(at), ring(at.part == at.ring_part) {
    channels = by_channel(CODING, K::D, in.cap, in.budgets[at.kv]);
    begin = ring ? (at.chunk == 0) : at.part * at.share;
    end = ring ? 2 : min(begin + at.share, at.tiles);
  }
  __device__ __forceinline__ int valid(int i) const {
    return ring ? (i == 0 ? CHUNK : at.position % CHUNK + 1) : at.kept - i * CHUNK;
  }
  // Copies tile i to rows 0..64 (keys) and 64..128 (values), and commits. Of codes it begins to: `place` ends it.
  template <class STAGE>
  __device__ __forceinline__ void load(int i, STAGE to) {
    if (i < end) {
      const int64_t from = ring ? at.bk * RING + (at.chunk + 1 + i) % 2 * CHUNK : in.store(at.b, at.kv) + int64_t(i) * CHUNK;
      if (CODING != STILL_PLAIN && !ring) {
        auto coded = [&](const T* rows, bool keys) { return CodedRows(rows, in.all_entries, CODING, K::D, keys); };
        ahead.fetch(coded(in.store_k, true), coded(in.store_v, false), from, valid(i));
      } else {
        load_matrix<128, CHUNK>(to, 0, (ring ? in.ring_k : in.store_k) + from * K::D, K::D, valid(i));
        load_matrix<128, CHUNK>(to, CHUNK, (ring ? in.ring_v : in.store_v) + from * K::D, K::D, valid(i));
      }
    }
    copy_commit();
  }
  // Where nobody reads the tile's memory any more, nor its 128 `scales`.
  template <class STAGE>
  __device__ __forceinline__ void place(int i, STAGE to, float* scales) const {
    if (CODING != STILL_PLAIN && !ring && i < end) ahead.place(to, scales, channels);
  }
};

// Adds the token to the ring. A barrier is to come before the ring is read.
template <class K>
__device__ __forceinline__ void enter_ring(const Decode<typename K::T>& in, const Place& at, float* window) {
  const int64_t to = (at.bk * RING + at.position % RING) * K::D;
  for (int i = threadIdx.x; i < K::D; i += DECODE_THREADS) {
    const typename K::T* const k = in.k.row(at.b, at.kv, 0);
    in.ring_k[to + i] = in.cos ? typename K::T(rotated_value(k, i, in.rope(at.b))) : k[i];
    in.ring_v[to + i] = in.v.row(at.b, at.kv, 0)[i];
  }
  for (int i = threadIdx.x; i < in.group * RING; i += DECODE_THREADS) window[i] = -INFINITY;
}

// The group's queries to their tile, as the keys are that they meet: of the ring, or (`coded`) codes of the store, that may be `rotated`.
template <class K>
__device__ __forceinline__ void load_queries(const Decode<typename K::T>& in, const Place& at, typename DecodeMemory<K>::Queries to,
                                             bool coded, bool rotated) {
  const typename K::T* const q = in.q.row(at.b, at.kv * in.group, 0);
  const float* const key_scale = coded && in.key_scale ? in.key_scale + at.kv * K::D : nullptr;
  if (rotated || key_scale) {
    transform_queries(to, q, in.q.head, in.group, in.rope(at.b), key_scale, rotated);
  } else if (in.cos) {
    rotate_queries(to, q, in.q.head, in.group, in.rope(at.b));
  } else {
    load_matrix<DECODE_THREADS, GROUP>(to, 0, q, in.q.head, in.group);
  }
}

// Attends to the block's tiles. Logits over the ring stay, for the score.
template <class K, int CODING>
__device__ __forceinline__ void attend_rows(const Stored<typename K::T>& in, const Place& at, const DecodeMemory<K>& memory,
                                            OnlineSoftmax<K::D / 8>& mine) {
  constexpr int D = K::D, KS = D / 16;
  RowShare<K, CODING> share(in, at);
  // No kernel of the step writes the first tile: rows of the store unless a chunk retires, or of the chunk before the token's.
  const bool settled = share.ring ? share.begin == 0 : !retires(at.position);
  if (settled) share.load(share.begin, memory.stage(share.begin));
  wait_for_previous();
  if (share.ring) enter_ring<K>(in, at, memory.window());
  load_queries<K>(in, at, memory.queries(), CODING != STILL_PLAIN && !share.ring, CODING == STILL_INT4 && !share.ring && !share.channels);
  if (settled) {
    copy_commit();
  } else {
    if (share.ring) __syncthreads();
    share.load(share.begin, memory.stage(share.begin));
  }
  __shared__ float scales[CODING == STILL_INT8 ? 2 : 1][2 * CHUNK];  // of two tiles' keys and values
  auto scales_of = [&](int i) { return scales[CODING == STILL_INT8 ? i % 2 : 0]; };
  const bool scaled = CODING == STILL_INT8 && !share.ring;
  share.place(share.begin, memory.stage(share.begin), scales_of(share.begin));
  Left<K::P> q[KS];
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
    product_nt<KS, 2>(s, q, memory.stage(i), threadIdx.x / 32 * 16);
    weigh_keys(mine, s, [&](float x, int row, int key) {
      const float l = key < share.valid(i) ? x * (scaled ? scale * scales_of(i)[key] : scale) : -INFINITY;
      if (share.ring && row < in.group) memory.window()[row * RING + i * CHUNK + key] = l;
      return hidden && !(i == 1 && key == at.position % CHUNK) ? -INFINITY : l;
    });
    if (scaled) scale_weights(s, scales_of(i) + CHUNK);
    add_values(mine, s, memory.stage(i));
    share.place(i + 1, memory.stage(i + 1), scales_of(i + 1));
  }
}

// Four warps' sums to one, which the block leaves in `to`: brought to the block's maximum, added in order. `numerators` is shared
// memory of [4, GROUP, D + 8]: the eights keep lanes of a warp on banks of their own.
template <class K>
__device__ __forceinline__ void merge_warps(const OnlineSoftmax<K::D / 8>& mine, int group, float* numerators, WarpStats<true>& warps, float* to) {
  constexpr int D = K::D, STRIDE = D + 8;
  static_assert(2 * DecodeMemory<K>::Stage::BYTES >= DECODE_WARPS * GROUP * STRIDE * 4);
  warps.leave(mine);
  __syncthreads();
  warps.leave_numerators(mine, group, numerators + threadIdx.x / 32 * GROUP * STRIDE, STRIDE);
  __syncthreads();
  for (int i = threadIdx.x; i < group * D; i += DECODE_THREADS) {
    const float* const from = numerators + i / D * STRIDE + i % D;
    to[i] = from[0] + from[GROUP * STRIDE] + from[2 * GROUP * STRIDE] + from[3 * GROUP * STRIDE];
  }
  if (threadIdx.x < group) {
    const int row = threadIdx.x;
    const float m = warps.largest(row);
    to[GROUP * D + row] = m;
    to[GROUP * (D + 1) + row] = warps.sum(row, m);
  }
}

}  // namespace still
