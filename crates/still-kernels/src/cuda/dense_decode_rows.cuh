// Attention of one token's block to its tiles: of rows as they come, or of codes.
#pragma once
#include "dense_decode_block.cuh"

namespace still {

// Copies 64 rows of tile `i` to rows `first..`; the new token's is not in the cache yet, and left out if `fresh` is null.
template <class K, class STAGE>
__device__ __forceinline__ void load_tile(STAGE to, int first, const Rows<typename K::T>& cache, const typename K::T* fresh,
                                          const DensePlace& at, int i) {
  constexpr int PIECES = K::D / 8, STEPS = CHUNK * PIECES / DECODE_THREADS;
  static_assert(CHUNK * PIECES % DECODE_THREADS == 0);
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int piece = threadIdx.x + j * DECODE_THREADS, row = piece / PIECES, col = piece % PIECES * 8, t = i * CHUNK + row;
    const typename K::T* from = t < at.position ? cache.row(at.b, at.kv, t) : fresh;
    if (fresh || t != at.position) copy_piece(to, first + row, col, t <= at.position ? from + col : nullptr, cache.data);
  }
}

// A warp attends to its 16 keys of a tile. `scales`: what the logits of its 64 keys are multiplied by, and the weights of its 64
// values; null: nothing.
template <class K>
__device__ __forceinline__ void attend_tile(const DensePlace& at, const DenseMemory<K>& memory, int i, OnlineSoftmax<K::D / 8>& mine,
                                            const float* scales = nullptr) {
  constexpr int P = K::P;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = rsqrtf(float(K::D)) * LOG2E;
  const auto tile = memory.stage(i);
  float s[2][4];
  clear(s);
#pragma unroll
  for (int step = 0; step < K::D / 16; step++) {
    const int row = warp * 16 + lane / 16 * 8 + lane % 8, col = step * 16 + lane / 8 % 2 * 8;
    Left<P> q;
    load_left(q, memory.queries(), 0, step * 16);
    uint32_t keys[P][4];
#pragma unroll
    for (int p = 0; p < P; p++) load_matrices(keys[p], tile.at(p, row, col));
    multiply(s[0], q, keys, 0);
    multiply(s[1], q, keys, 1);
  }
  const int newest = at.position - i * CHUNK;
  weigh_keys(mine, s, [&](float x, int, int key) {
    return key <= newest ? x * (scales ? scale * scales[key] : scale) : -INFINITY;
  });
  if (scales) scale_weights(s, scales + CHUNK);
  add_values(mine, s, tile);
}

// The new token's key to the tile that it belongs to, and to the cache, rotated on the way: eight channels a thread.
template <class K>
__device__ __forceinline__ void rotate_key(const DenseDecode<typename K::T>& in, const DensePlace& at, const StepRope& rope,
                                           typename DenseMemory<K>::Stage to) {
  const int col = threadIdx.x * EIGHT;
  float rotated[EIGHT];
  rotate_piece(rotated, in.k.row(at.b, at.kv, 0), col, rope);
  store_eight(to, at.position % CHUNK, col, rotated);
  store_values(in.keys.row(at.b, at.kv, at.position) + col, rotated);
}

// The block's tiles of a cache of rows as they come.
template <class K>
__device__ __forceinline__ void attend_tiles(const DenseDecode<typename K::T>& in, const DensePlace& at, const DenseMemory<K>& memory,
                                             OnlineSoftmax<K::D / 8>& mine) {
  using T = typename K::T;
  constexpr int STAGES = DenseMemory<K>::STAGES;
  const T *k = in.k.row(at.b, at.kv, 0), *v = in.v.row(at.b, at.kv, 0), *q = in.q.row(at.b, at.head, 0);
  const StepRope rope = in.rope(at.b);
  const bool rotates = in.cos != nullptr;
  auto load = [&](int i) {
    if (i < at.end) {
      load_tile<K>(memory.stage(i), 0, in.keys, rotates ? nullptr : k, at, i);
      load_tile<K>(memory.stage(i), CHUNK, in.values, v, at, i);
      if (rotates && i == at.position / CHUNK && threadIdx.x < K::D / EIGHT) rotate_key<K>(in, at, rope, memory.stage(i));
    }
    copy_commit();
  };
  // Tiles without the new token are in the cache before the step; queries that are copied belong to the first tile's copies.
  constexpr int FIRST = STAGES > 1 ? STAGES - 1 : 1;
  const int ready = rotates ? min(FIRST, at.position / CHUNK - at.begin) : 0;
  for (int i = 0; i < ready; i++) load(at.begin + i);
  wait_for_previous();
  if (!rotates) load_matrix<DECODE_THREADS, GROUP>(memory.queries(), 0, q, in.q.head, at.heads);
  for (int i = ready; i < FIRST; i++) load(at.begin + i);
  if (rotates) rotate_queries(memory.queries(), q, in.q.head, at.heads, rope);
  clear(mine.out);
  for (int i = at.begin; i < at.end; i++) {
    if (STAGES == 1 && i > at.begin) {
      __syncthreads();
      load(i);
    }
    copy_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
    __syncthreads();
    if (STAGES > 1) load(i + STAGES - 1);
    attend_tile<K>(at, memory, i, mine);
  }
}

// The rows of a head's keys or values.
template <class K, int CODING>
__device__ __forceinline__ CodedRows coded_rows(const StillRows& rows, uint32_t* words, const DensePlace& at, bool keys) {
  constexpr int BYTES = code_bytes(CODING, K::D);
  const int64_t first = at.b * rows.batch + at.kv * rows.head;
  return CodedRows(static_cast<uint8_t*>(rows.data) + first, words + first / BYTES * code_words(CODING, K::D), CODING, K::D, keys);
}

// The new token's key and value to the cache, by a warp each.
template <class K>
__device__ __forceinline__ void code_token(const DenseDecode<typename K::T>& in, const DensePlace& at, const CodedRows& keys,
                                           const CodedRows& values) {
  WarpRow<code_groups(K::D)> x = {};
  if (threadIdx.x / 32 == 0) {
    x.load_by(K::D, [&](int channel) { return rotated_value(in.k.row(at.b, at.kv, 0), channel, in.rope(at.b)); });
    x.encode(keys, at.position);
  } else if (threadIdx.x / 32 == 1) {
    x.load(in.v.row(at.b, at.kv, 0), K::D);
    x.encode(values, at.position);
  }
}

// The block's tiles of a cache of codes. The block that has the new token's tile codes it first.
template <class K, int CODING>
__device__ __forceinline__ void attend_codes(const DenseDecode<typename K::T>& in, const DensePlace& at, const DenseMemory<K>& memory,
                                             OnlineSoftmax<K::D / 8>& mine) {
  constexpr bool AHEAD = K::D <= 128;  // wider rows' codes do not fit into registers beside the sums
  const CodedRows keys = coded_rows<K, CODING>(in.cache.k, in.cache.k_words, at, true);
  const CodedRows values = coded_rows<K, CODING>(in.cache.v, in.cache.v_words, at, false);
  __shared__ float scales[CODING == STILL_INT8 ? 2 : 1][2 * CHUNK];  // of two tiles' keys and values
  CodesAhead<K, CODING> ahead;
  auto fetch = [&](int i) {
    if (i < at.end) ahead.fetch(keys, values, int64_t(i) * CHUNK, at.position + 1 - i * CHUNK);
  };
  auto place = [&](int i) {
    if (i < at.end) ahead.place(memory.stage(i), scales[CODING == STILL_INT8 ? i % 2 : 0]);
  };
  // Tiles without the new token are in the cache before the step.
  const bool has_token = at.end > at.position / CHUNK, settled = at.begin < at.position / CHUNK;
  if (settled) fetch(at.begin);
  wait_for_previous();
  if (has_token) code_token<K>(in, at, keys, values);
  transform_queries(memory.queries(), in.q.row(at.b, at.head, 0), in.q.head, at.heads, in.rope(at.b), nullptr, CODING == STILL_INT4);
  if (!settled) {
    __syncthreads();
    fetch(at.begin);
  }
  place(at.begin);
  clear(mine.out);
  for (int i = at.begin; i < at.end; i++) {
    __syncthreads();
    if (AHEAD) fetch(i + 1);
    attend_tile<K>(at, memory, i, mine, CODING == STILL_INT8 ? scales[i % 2] : nullptr);
    if (DenseMemory<K>::STAGES == 1) __syncthreads();
    if (!AHEAD) fetch(i + 1);
    place(i + 1);
  }
}

}  // namespace still
