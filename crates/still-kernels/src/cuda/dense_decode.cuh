// Dense attention of one token of every sequence. Blocks share the tokens of a (sequence, KV head); each attends for up to 16
// query heads at once, which are the rows of its products, and leaves a partial result. The last to arrive adds them up in order.
#pragma once
#include <type_traits>
#include "codes_ahead.cuh"
#include "dense.cuh"
#include "early.cuh"
#include "last_block.cuh"
#include "online_softmax.cuh"
#include "rotate_step.cuh"

namespace still {

constexpr int DENSE_GROUP = 16, DENSE_THREADS = 128;
// Tiles of 64 tokens that are worth a block.
constexpr int DENSE_SHARE = 2;

template <class T>
struct DenseDecode {
  Rows<const T> q, k, v;
  Rows<T> out, keys, values;  // the last two: of the cache, if it has no codes
  StillDenseCache cache;
  const int32_t* positions;
  const float *cos, *sin;  // null: q and k are rotated
  float* partial;
  uint32_t* arrived;
  int half;                             // of the channels that are rotated
  int splits, kv_heads, group, slices;  // slices of up to 16 query heads of a group
  const StillDenseSequence* caches;

  DenseDecode(const StillShape& shape, const StillDenseDecode& a)
      : q(a.q), k(a.k), v(a.v), out(a.out), keys(a.cache.k), values(a.cache.v), cache(a.cache), positions(a.positions), cos(a.cos),
        sin(a.sin), partial(a.partial), arrived(a.arrived), half(a.rotary / 2), splits(a.splits), kv_heads(shape.kv_heads), group(shape.heads / shape.kv_heads),
        slices((group + DENSE_GROUP - 1) / DENSE_GROUP), caches(a.caches) {}

  // What the blocks of sequence `b` read. EACH: sequences have a cache each.
  template <bool EACH>
  __device__ __forceinline__ std::conditional_t<EACH, DenseDecode, const DenseDecode&> own(int b, int d) const {
    if constexpr (!EACH) {
      return *this;
    } else {
      DenseDecode in = *this;
      const StillDenseSequence& own = caches[b];
      in.cache.k = {own.k, 0, own.head, d};
      in.cache.v = {own.v, 0, own.head, d};
      in.cache.k_words = own.k_words;
      in.cache.v_words = own.v_words;
      in.keys = Rows<T>(in.cache.k);
      in.values = Rows<T>(in.cache.v);
      return in;
    }
  }
};

// Floats of one block's partial result, a multiple of four: numerators [heads, D], then maxima and sums [2, heads].
__host__ __device__ inline int64_t partial_floats(int group, int d) {
  return int64_t((group < DENSE_GROUP ? group : DENSE_GROUP) * (d + 2) + 3) / 4 * 4;
}

// Dynamic shared memory: stages of 64 keys and 64 values each, and the queries. When the stages are done with, the sums of the
// four warps take their place, and then what the last block adds up all from: sums, and the maxima and weights that they have.
template <class K>
struct DenseMemory {
  using Stage = Tile<K::P, 128, K::D>;
  using Queries = Tile<K::P, DENSE_GROUP, K::D>;
  static constexpr int STAGES = K::P == 1 ? (K::D <= 64 ? 4 : 2) : (K::D <= 128 ? 2 : 1);
  static constexpr int BYTES = STAGES * Stage::BYTES + Queries::BYTES;
  static constexpr int TOPS = DENSE_GROUP * K::D;  // where they begin, in floats
  static_assert(STAGES * Stage::BYTES >= 4 * DENSE_GROUP * K::D * 4);
  static_assert(STAGES * Stage::BYTES >= 4 * (TOPS + 2 * TOPS / 4) && TOPS >= 4 * DENSE_THREADS);

  uint32_t base;
  __device__ __forceinline__ Stage stage(int i) const { return Stage{base + i % STAGES * Stage::BYTES}; }
  __device__ __forceinline__ Queries queries() const { return Queries{base + STAGES * Stage::BYTES}; }
};

// Which tokens of which heads a block has.
struct DensePlace {
  int b, kv, head, heads;  // the first of its query heads, and how many
  int position;            // of the new token
  int begin, end;          // tiles of 64 tokens
  int used;                // blocks that have any
  int64_t row;             // of (sequence, KV head, slice)

  template <class T>
  __device__ __forceinline__ DensePlace(const DenseDecode<T>& in, int position)
      : b(blockIdx.z), kv(blockIdx.y / in.slices), position(position), row(int64_t(blockIdx.z) * gridDim.y + blockIdx.y) {
    const int first = blockIdx.y % in.slices * DENSE_GROUP;
    head = kv * in.group + first;
    heads = min(DENSE_GROUP, in.group - first);
    const int tiles = position / CHUNK + 1, share = max(DENSE_SHARE, (tiles + in.splits - 1) / in.splits);
    used = (tiles + share - 1) / share;
    begin = blockIdx.x * share;
    end = min(begin + share, tiles);
  }
};

// Copies 64 rows of tile `i` to rows `first..`; the new token's is not in the cache yet, and left out if `fresh` is null.
template <class K, class STAGE>
__device__ __forceinline__ void load_tile(STAGE to, int first, const Rows<typename K::T>& cache, const typename K::T* fresh,
                                          const DensePlace& at, int i) {
  constexpr int PIECES = K::D / 8, STEPS = CHUNK * PIECES / DENSE_THREADS;
  static_assert(CHUNK * PIECES % DENSE_THREADS == 0);
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int piece = threadIdx.x + j * DENSE_THREADS, row = piece / PIECES, col = piece % PIECES * 8, t = i * CHUNK + row;
    const typename K::T* from = t < at.position ? cache.row(at.b, at.kv, t) : fresh;
    if (t != at.position || fresh) copy_piece(to, first + row, col, t <= at.position ? from + col : nullptr, cache.data);
  }
}

// What a warp has of the rows of its lanes: numerators, largest logits (in base 2) and sums.
template <int NT>
struct DenseSums {
  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// A warp attends to its 16 keys of a tile. `scales`: what the logits of its 64 keys are multiplied by, and the weights of its 64
// values; null: nothing.
template <class K>
__device__ __forceinline__ void attend_tile(const DensePlace& at, const DenseMemory<K>& memory, int i, DenseSums<K::D / 8>& mine,
                                            const float* scales = nullptr) {
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = rsqrtf(float(D)) * LOG2E;
  const auto tile = memory.stage(i);
  float s[2][4];
  clear(s);
#pragma unroll
  for (int step = 0; step < KS; step++) {
    const int row = warp * 16 + lane / 16 * 8 + lane % 8, col = step * 16 + lane / 8 % 2 * 8;
    Left<P> q;
    load_left(q, memory.queries(), 0, step * 16);
    uint32_t keys[P][4];
#pragma unroll
    for (int p = 0; p < P; p++) load_matrices(keys[p], tile.at(p, row, col));
    multiply(s[0], q, keys, 0);
    multiply(s[1], q, keys, 1);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int key = warp * 16 + n * 8 + lane % 4 * 2 + e;
        float& l = s[n][half * 2 + e];
        l = i * CHUNK + key <= at.position ? l * (scales ? scale * scales[key] : scale) : -INFINITY;
      }
    // A warp may have seen no key yet.
    const float raised = fmaxf(mine.m[half], row_top(s, half));
    const bool any = raised > -INFINITY;
    rescale(mine.out, mine.sum[half], half, any ? exp2_fast(mine.m[half] - raised) : 1.f);
    mine.m[half] = raised;
    add_weights(s, mine.sum[half], half, [&](float l) { return any ? exp2_fast(l - raised) : 0.f; });
  }
  if (scales)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= scales[CHUNK + warp * 16 + n * 8 + lane % 4 * 2 + e % 2];
  Left<P> weights[1];
  to_left(weights[0], s[0], s[1]);
  product_nn<1, NT>(mine.out, weights, tile, CHUNK + warp * 16);
}

// The block's tiles of a cache of rows as they come.
template <class K>
__device__ __forceinline__ void attend_tiles(const DenseDecode<typename K::T>& in, const DensePlace& at, const DenseMemory<K>& memory,
                                             DenseSums<K::D / 8>& mine) {
  using T = typename K::T;
  constexpr int D = K::D, STAGES = DenseMemory<K>::STAGES;
  const T *k = in.k.row(at.b, at.kv, 0), *v = in.v.row(at.b, at.kv, 0);
  const bool rotates = in.cos != nullptr;
  auto load = [&](int i) {
    if (i < at.end) {
      load_tile<K>(memory.stage(i), 0, in.keys, rotates ? nullptr : k, at, i);
      load_tile<K>(memory.stage(i), CHUNK, in.values, v, at, i);
      if (rotates && i == at.position / CHUNK && threadIdx.x < D / EIGHT) {
        const int col = threadIdx.x * EIGHT;
        float rotated[EIGHT];
        rotate_piece(rotated, k, col, in.cos + at.b * in.half, in.sin + at.b * in.half, in.half);
        store_eight(memory.stage(i), at.position % CHUNK, col, rotated);
        store_values(in.keys.row(at.b, at.kv, at.position) + col, rotated);
      }
    }
    copy_commit();
  };
  const T* const q = in.q.row(at.b, at.head, 0);
  // Tiles without the new token are in the cache before the step; queries that are copied belong to the first tile's copies.
  constexpr int FIRST = STAGES > 1 ? STAGES - 1 : 1;
  const int ready = rotates ? min(FIRST, at.position / CHUNK - at.begin) : 0;
  for (int i = 0; i < ready; i++) load(at.begin + i);
  wait_for_previous();
  if (!rotates) load_matrix<DENSE_THREADS, DENSE_GROUP>(memory.queries(), 0, q, in.q.head, at.heads);
  for (int i = ready; i < FIRST; i++) load(at.begin + i);
  for (int i = threadIdx.x; rotates && i < DENSE_GROUP * D / EIGHT; i += DENSE_THREADS) {
    const int row = i / (D / EIGHT), col = i % (D / EIGHT) * EIGHT;
    float rotated[EIGHT] = {};
    if (row < at.heads) rotate_piece(rotated, q + row * in.q.head, col, in.cos + at.b * in.half, in.sin + at.b * in.half, in.half);
    store_eight(memory.queries(), row, col, rotated);
  }
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

// The group's queries to their tile, rotated as keys are before they are coded in 4 bits.
template <class K, int CODING>
__device__ __forceinline__ void load_queries(const DenseDecode<typename K::T>& in, const DensePlace& at, typename DenseMemory<K>::Queries to) {
  constexpr int D = K::D, GROUPS = code_groups(D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float *const cos = in.cos ? in.cos + at.b * in.half : nullptr, *const sin = in.sin + at.b * in.half;
  for (int g = warp; g < DENSE_GROUP; g += DENSE_THREADS / 32) {
    WarpRow<GROUPS> x = {};
    const typename K::T* const q = in.q.row(at.b, at.head + g, 0);
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if (g < at.heads && j * CODE_GROUP + lane < D) x.x[j] = rotated_value(q, j * CODE_GROUP + lane, cos, sin, in.half);
    if (CODING == STILL_INT4) x.rotate(D);
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if (j * CODE_GROUP + lane < D) store_one(to, g, j * CODE_GROUP + lane, x.x[j]);
  }
}

// The new token's key and value to the cache, by a warp each.
template <class K>
__device__ __forceinline__ void code_token(const DenseDecode<typename K::T>& in, const DensePlace& at, const CodedRows& keys,
                                           const CodedRows& values) {
  constexpr int D = K::D, GROUPS = code_groups(D);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpRow<GROUPS> x = {};
  if (warp == 0) {
    const float *const cos = in.cos ? in.cos + at.b * in.half : nullptr, *const sin = in.sin + at.b * in.half;
    const typename K::T* const k = in.k.row(at.b, at.kv, 0);
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      if (j * CODE_GROUP + lane < D) x.x[j] = rotated_value(k, j * CODE_GROUP + lane, cos, sin, in.half);
    x.encode(keys, at.position);
  } else if (warp == 1) {
    x.load(in.v.row(at.b, at.kv, 0), D);
    x.encode(values, at.position);
  }
}

// The block's tiles of a cache of codes. The block that has the new token's tile codes it first.
template <class K, int CODING>
__device__ __forceinline__ void attend_codes(const DenseDecode<typename K::T>& in, const DensePlace& at, const DenseMemory<K>& memory,
                                             DenseSums<K::D / 8>& mine) {
  constexpr int D = K::D;
  constexpr bool AHEAD = D <= 128;  // wider rows' codes do not fit into registers beside the sums
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
  load_queries<K, CODING>(in, at, memory.queries());
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

// What the four warps, and then the block, have for each query head.
struct DenseScratch {
  float maxima[4][DENSE_GROUP], sums[4][DENSE_GROUP];
  float maximum[DENSE_GROUP], sum[DENSE_GROUP];
};

// Brings the four warps' sums to the block's maximum and leaves their numerators as [4, heads, D].
template <class K>
__device__ __forceinline__ void merge_warps(const DenseSums<K::D / 8>& mine, int heads, float* numerators, DenseScratch& scratch) {
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
  copy_wait<0>();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = lane / 4 + half * 8;
    if (row >= heads) continue;
    // The block has a key, so that its maximum is finite.
    const float weight = exp2f(mine.m[half] - largest(row));
    float* to = numerators + (warp * heads + row) * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < NT; n++) store_pair(to + n * 8, mine.out[n][half * 2] * weight, mine.out[n][half * 2 + 1] * weight);
  }
  if (int(threadIdx.x) < heads) {
    const int row = threadIdx.x;
    const float top = largest(row);
    float all = 0.f;
    for (int w = 0; w < 4; w++) all += sums[w][row] * exp2f(maxima[w][row] - top);
    scratch.maximum[row] = top;
    scratch.sum[row] = all;
  }
  __syncthreads();
}

__device__ __forceinline__ void add(float4& to, float4 x, float weight) {
  to.x += x.x * weight;
  to.y += x.y * weight;
  to.z += x.z * weight;
  to.w += x.w * weight;
}

__device__ __forceinline__ void store_four(float* to, float4 x, float factor) {
  *reinterpret_cast<float4*>(to) = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}
__device__ __forceinline__ void store_four(__nv_bfloat16* to, float4 x, float factor) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(x.x * factor, x.y * factor), pack(x.z * factor, x.w * factor));
}

// The output from all blocks' partial results, each `stride` floats behind the one before. A thread adds up four channels; where
// there are fewer columns than threads, several share a column's blocks. Loads of BATCH blocks are in flight at a time.
template <class K>
__device__ __forceinline__ void merge_blocks(const DenseDecode<typename K::T>& in, const DensePlace& at, const float* partial,
                                             int64_t stride, float* floats) {
  constexpr int D = K::D, BATCH = 16;
  const int columns = at.heads * D / 4, ways = max(1, DENSE_THREADS / columns);
  float4* const sums = reinterpret_cast<float4*>(floats);
  float2* const tops = reinterpret_cast<float2*>(floats + DenseMemory<K>::TOPS);  // maxima and sums of weights
  for (int i = threadIdx.x; i < columns * ways; i += DENSE_THREADS) {
    const int column = i % columns, row = column * 4 / D;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float top = -INFINITY, all = 0.f;
    for (int first = i / columns; first < at.used; first += BATCH * ways) {
      float4 x[BATCH];
      float m[BATCH], shares[BATCH], raised = top;
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const int part = first + j * ways;
        const float *from = partial + min(part, at.used - 1) * stride, *stats = from + at.heads * D + row;
        x[j] = __ldcg(reinterpret_cast<const float4*>(from) + column);
        m[j] = part < at.used ? __ldcg(stats) : -INFINITY;
        shares[j] = __ldcg(stats + at.heads);
      }
#pragma unroll
      for (int j = 0; j < BATCH; j++) raised = fmaxf(raised, m[j]);
      const float shrink = exp2f(top - raised);
      sum = make_float4(sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink);
      all *= shrink;
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const float weight = exp2f(m[j] - raised);
        add(sum, x[j], weight);
        all += shares[j] * weight;
      }
      top = raised;
    }
    sums[i] = sum;
    tops[i] = make_float2(top, all);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += DENSE_THREADS) {
    float top = -INFINITY, all = 0.f;
    for (int way = 0; way < ways; way++) top = fmaxf(top, tops[way * columns + i].x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int way = 0; way < ways; way++) {
      const float2 own = tops[way * columns + i];
      const float weight = exp2f(own.x - top);
      add(sum, sums[way * columns + i], weight);
      all += own.y * weight;
    }
    store_four(in.out.row(at.b, at.head + i * 4 / D, 0) + i * 4 % D, sum, 1.f / all);
  }
}

template <class K, bool EACH, int CODING>
__global__ void __launch_bounds__(DENSE_THREADS) dense_decode(const DenseDecode<typename K::T> all) {
  constexpr int D = K::D;
  let_next_begin();
  const int position = all.positions[blockIdx.z];
  if (position < 0) return wait_for_previous();
  const DenseDecode<typename K::T>& in = all.template own<EACH>(blockIdx.z, D);
  const DensePlace at(in, position);
  if (int(blockIdx.x) >= at.used) return;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ DenseScratch scratch;
  const DenseMemory<K> memory{shared_address(dynamic)};
  float* const floats = reinterpret_cast<float*>(dynamic);

  DenseSums<D / 8> sums;
  if constexpr (CODING != STILL_PLAIN) {
    attend_codes<K, CODING>(in, at, memory, sums);
  } else {
    attend_tiles<K>(in, at, memory, sums);
    // No block reads it from there in this step.
    for (int i = threadIdx.x; i < D && int(blockIdx.x) == at.used - 1; i += DENSE_THREADS) {
      if (!in.cos) in.keys.row(at.b, at.kv, position)[i] = in.k.row(at.b, at.kv, 0)[i];
      in.values.row(at.b, at.kv, position)[i] = in.v.row(at.b, at.kv, 0)[i];
    }
  }
  merge_warps<K>(sums, at.heads, floats, scratch);

  const int64_t stride = partial_floats(in.group, D);
  float *const partial = in.partial + at.row * in.splits * stride, *const own = partial + blockIdx.x * stride;
  const int columns = at.heads * D / 4;
  const float4* warps = reinterpret_cast<const float4*>(floats);
  for (int i = threadIdx.x; i < columns; i += DENSE_THREADS) {
    float4 sum = warps[i];
    for (int w = 1; w < 4; w++) add(sum, warps[w * columns + i], 1.f);
    const int row = i * 4 / D;
    if (at.used == 1) store_four(in.out.row(at.b, at.head + row, 0) + i * 4 % D, sum, 1.f / scratch.sum[row]);
    else reinterpret_cast<float4*>(own)[i] = sum;
  }
  if (at.used == 1) return;
  if (int(threadIdx.x) < at.heads) {
    own[at.heads * D + threadIdx.x] = scratch.maximum[threadIdx.x];
    own[at.heads * (D + 1) + threadIdx.x] = scratch.sum[threadIdx.x];
  }
  if (is_last_block(in.arrived + at.row, at.used)) merge_blocks<K>(in, at, partial, stride, floats);
}

// Of a cache whose rows are kept so.
template <int CODING>
int launch_dense_decode(const StillShape& shape, const StillDenseDecode& args, StillStream stream) {
  return dense_dispatch(shape, [&](auto kind) -> int {
    using K = decltype(kind);
    if constexpr (CODING == STILL_INT4 && K::P == 1) {
      return cudaErrorInvalidValue;  // rotated queries and keys rounded to bf16 cost more than a bf16 step may be off by
    } else {
      const DenseDecode<typename K::T> in(shape, args);
      const dim3 grid(in.splits, in.kv_heads * in.slices, shape.batch);
      return launch_early(args.caches ? dense_decode<K, true, CODING> : dense_decode<K, false, CODING>, grid, DENSE_THREADS,
                          DenseMemory<K>::BYTES, stream, in);
    }
  });
}

// The one of int8 and int4 rows, compiled apart.
int launch_dense_decode_codes(const StillShape& shape, const StillDenseDecode& args, StillStream stream);

}  // namespace still
