// The exact branch of one token: a block attends to its share of the store, or to the ring, for the KV head's group of queries.
#pragma once
#include "codes_ahead.cuh"
#include "decode_block.cuh"
#include "online_softmax.cuh"

namespace still {

// The keys and values of one block, in tiles `begin..end` of 64: of the store, or the ring's two chunks (the one before, this one).
template <class K, int CODING>
struct RowShare {
  using T = typename K::T;
  const Stored<T>& in;
  const Place& at;
  bool ring;
  int begin, end;
  CodesAhead<K, CODING> ahead;

  __device__ __forceinline__ RowShare(const Stored<T>& in, const Place& at) : in(in), at(at), ring(at.part == at.ring_part) {
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
    if (CODING != STILL_PLAIN && !ring && i < end) ahead.place(to, scales);
  }
};

// Adds the token to the ring. A barrier is to come before the ring is read.
template <class K>
__device__ __forceinline__ void enter_ring(const Decode<typename K::T>& in, const Place& at, float* window) {
  const int64_t to = (at.bk * RING + at.position % RING) * K::D;
  for (int i = threadIdx.x; i < K::D; i += 128) {
    const typename K::T* const k = in.k.row(at.b, at.kv, 0);
    in.ring_k[to + i] = in.cos ? typename K::T(rotated_value(k, i, in.cosines(at.b), in.sines(at.b), in.half)) : k[i];
    in.ring_v[to + i] = in.v.row(at.b, at.kv, 0)[i];
  }
  for (int i = threadIdx.x; i < in.group * RING; i += 128) window[i] = -INFINITY;
}

// What a warp has of the rows of its lanes: numerators, largest logits (in base 2) and sums.
template <int NT>
struct RowSums {
  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// Attends to the block's tiles, a warp to 16 keys of each. Logits over the ring stay, for the score.
template <class K, int CODING>
__device__ __forceinline__ void attend_rows(const Stored<typename K::T>& in, const Place& at, const DecodeMemory<K>& memory,
                                            RowSums<K::D / 8>& mine) {
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RowShare<K, CODING> share(in, at);
  float* const window = memory.window();
  // No kernel of the step writes the first tile: rows of the store unless a chunk retires, or of the chunk before the token's.
  const bool settled = share.ring ? share.begin == 0 : !retires(at.position);
  if (settled) share.load(share.begin, memory.stage(share.begin));
  wait_for_previous();
  if (share.ring) enter_ring<K>(in, at, window);
  const float* const key_scale = CODING != STILL_PLAIN && !share.ring && in.key_scale ? in.key_scale + at.kv * D : nullptr;
  if ((CODING == STILL_INT4 && !share.ring) || key_scale) {
    for (int g = warp; g < GROUP; g += 4) {
      WarpRow<code_groups(D)> x = {};
      const typename K::T* const q = in.q.row(at.b, at.kv * in.group + g, 0);
#pragma unroll
      for (int j = 0; j < code_groups(D); j++) {
        const int channel = j * CODE_GROUP + lane;
        if (g < in.group && channel < D) x.x[j] = rotated_value(q, channel, in.cosines(at.b), in.sines(at.b), in.half);
      }
      if (key_scale) x.multiply(key_scale, D);
      if (CODING == STILL_INT4) x.rotate(D);
#pragma unroll
      for (int j = 0; j < code_groups(D); j++)
        if (D % CODE_GROUP == 0 || j * CODE_GROUP + lane < D) store_one(memory.queries(), g, j * CODE_GROUP + lane, x.x[j]);
    }
  } else if (in.cos) {
    for (int i = threadIdx.x; i < GROUP * D / EIGHT; i += 128) {
      const int row = i / (D / EIGHT), col = i % (D / EIGHT) * EIGHT;
      float x[EIGHT] = {};
      if (row < in.group) rotate_piece(x, in.q.row(at.b, at.kv * in.group + row, 0), col, in.cosines(at.b), in.sines(at.b), in.half);
      store_eight(memory.queries(), row, col, x);
    }
  } else {
    load_matrix<128, 16>(memory.queries(), 0, in.q.row(at.b, at.kv * in.group, 0), in.q.head, in.group);
  }
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
          l = key < share.valid(i) ? l * (scaled ? scale * scales_of(i)[key] : scale) : -INFINITY;
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
    if (scaled)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[n][e] *= scales_of(i)[CHUNK + warp * 16 + n * 8 + lane % 4 * 2 + e % 2];
    Left<P> p[1];
    to_left(p[0], s[0], s[1]);
    product_nn<1, NT>(mine.out, p, memory.stage(i), CHUNK + warp * 16);
    share.place(i + 1, memory.stage(i + 1), scales_of(i + 1));
  }
}

// Four warps' sums to one, which the block leaves in `to`: brought to the block's maximum, added in order. `numerators` is shared
// memory of [4, GROUP, D + 8]: the eights keep lanes of a warp on banks of their own.
template <class K>
__device__ __forceinline__ void merge_warps(const RowSums<K::D / 8>& mine, int group, float* numerators, DecodeScratch<K::D>& scratch,
                                            float* to) {
  constexpr int D = K::D, NT = D / 8, STRIDE = D + 8;
  static_assert(2 * DecodeMemory<K>::Stage::BYTES >= 4 * GROUP * STRIDE * 4);
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
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + half * 8;
    if (row >= group) continue;
    const float weight = mine.m[half] > -INFINITY ? exp2f(mine.m[half] - largest(row)) : 0.f;
    float* const own = numerators + (warp * GROUP + row) * STRIDE + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < NT; n++) store_pair(own + n * 8, mine.out[n][half * 2] * weight, mine.out[n][half * 2 + 1] * weight);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * D; i += 128) {
    const float* const from = numerators + i / D * STRIDE + i % D;
    to[i] = from[0] + from[GROUP * STRIDE] + from[2 * GROUP * STRIDE] + from[3 * GROUP * STRIDE];
  }
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
