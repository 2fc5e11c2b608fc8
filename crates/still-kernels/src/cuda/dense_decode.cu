// Dense attention of one token of every sequence. Blocks share the tokens of a (sequence, KV head); each attends for up to 16
// query heads at once, which are the rows of its products, and leaves a partial result. The last to arrive adds them up in order.
#include <type_traits>
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
  Rows<T> out, keys, values;
  const int32_t* positions;
  const float *cos, *sin;  // null: q and k are rotated
  float* partial;
  uint32_t* arrived;
  int half;                             // of the channels that are rotated
  int splits, kv_heads, group, slices;  // slices of up to 16 query heads of a group
  const StillDenseSequence* caches;

  DenseDecode(const StillShape& shape, const StillDenseDecode& a)
      : q(a.q), k(a.k), v(a.v), out(a.out), keys(a.cache_k), values(a.cache_v), positions(a.positions), cos(a.cos),
        sin(a.sin), partial(a.partial), arrived(a.arrived), half(a.rotary / 2), splits(a.splits), kv_heads(shape.kv_heads), group(shape.heads / shape.kv_heads),
        slices((group + DENSE_GROUP - 1) / DENSE_GROUP), caches(a.caches) {}

  // What the blocks of sequence `b` read. EACH: sequences have a cache each.
  template <bool EACH>
  __device__ __forceinline__ std::conditional_t<EACH, DenseDecode, const DenseDecode&> own(int b, int d) const {
    if constexpr (!EACH) {
      return *this;
    } else {
      DenseDecode in = *this;
      in.keys.data = static_cast<T*>(caches[b].k);
      in.values.data = static_cast<T*>(caches[b].v);
      in.keys.head = in.values.head = caches[b].head;
      in.keys.batch = in.values.batch = 0;
      in.keys.token = in.values.token = d;
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

// Eight values to (row, col) of a tile.
template <class TILE>
__device__ __forceinline__ void store_piece(TILE tile, int row, int col, const float (&x)[EIGHT]) {
  constexpr int P = TILE::P;
  uint32_t words[4][P];
#pragma unroll
  for (int i = 0; i < 4; i++) split<P>(x[2 * i], x[2 * i + 1], words[i]);
#pragma unroll
  for (int p = 0; p < P; p++) store_shared(tile.at(p, row, col), make_uint4(words[0][p], words[1][p], words[2][p], words[3][p]));
}

// What a warp has of the rows of its lanes: numerators, largest logits (in base 2) and sums.
template <int NT>
struct DenseSums {
  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
};

// A warp attends to 16 keys of each of the block's tiles.
template <class K>
__device__ __forceinline__ void attend_tiles(const DenseDecode<typename K::T>& in, const DensePlace& at, const DenseMemory<K>& memory,
                                             DenseSums<K::D / 8>& mine) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, STAGES = DenseMemory<K>::STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
        store_piece(memory.stage(i), at.position % CHUNK, col, rotated);
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
    store_piece(memory.queries(), row, col, rotated);
  }
  clear(mine.out);
  const float scale = rsqrtf(float(D)) * LOG2E;
  for (int i = at.begin; i < at.end; i++) {
    if (STAGES == 1 && i > at.begin) {
      __syncthreads();
      load(i);
    }
    copy_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
    __syncthreads();
    if (STAGES > 1) load(i + STAGES - 1);
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
          float& l = s[n][half * 2 + e];
          l = i * CHUNK + warp * 16 + n * 8 + lane % 4 * 2 + e <= at.position ? l * scale : -INFINITY;
        }
      // A warp may have seen no key yet.
      const float raised = fmaxf(mine.m[half], row_top(s, half));
      const bool any = raised > -INFINITY;
      rescale(mine.out, mine.sum[half], half, any ? exp2_fast(mine.m[half] - raised) : 1.f);
      mine.m[half] = raised;
      add_weights(s, mine.sum[half], half, [&](float l) { return any ? exp2_fast(l - raised) : 0.f; });
    }
    Left<P> weights[1];
    to_left(weights[0], s[0], s[1]);
    product_nn<1, NT>(mine.out, weights, tile, CHUNK + warp * 16);
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

template <class K, bool EACH>
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
  attend_tiles<K>(in, at, memory, sums);
  // No block reads it from there in this step.
  for (int i = threadIdx.x; i < D && int(blockIdx.x) == at.used - 1; i += DENSE_THREADS) {
    if (!in.cos) in.keys.row(at.b, at.kv, position)[i] = in.k.row(at.b, at.kv, 0)[i];
    in.values.row(at.b, at.kv, position)[i] = in.v.row(at.b, at.kv, 0)[i];
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

}  // namespace still

extern "C" int64_t still_dense_decode_floats(const StillShape* shape, int32_t splits) {
  const int group = shape->heads / shape->kv_heads, slices = (group + still::DENSE_GROUP - 1) / still::DENSE_GROUP;
  return int64_t(shape->batch) * shape->kv_heads * slices * splits * still::partial_floats(group, shape->head_dim);
}

extern "C" int still_dense_decode(const StillShape* shape, const StillDenseDecode* args, StillStream stream) {
  if (shape->tokens != 1 || args->splits < 1 || args->splits > STILL_DENSE_SPLITS) return cudaErrorInvalidValue;
  if (args->cos && (args->rotary < 0 || args->rotary % 16 || args->rotary > shape->head_dim)) return cudaErrorInvalidValue;
  return still::dense_dispatch<true>(*shape, [&](auto kind) -> int {
    using K = decltype(kind);
    const still::DenseDecode<typename K::T> in(*shape, *args);
    const dim3 grid(in.splits, in.kv_heads * in.slices, shape->batch);
    return still::launch_early(args->caches ? still::dense_decode<K, true> : still::dense_decode<K, false>, grid, still::DENSE_THREADS, still::DenseMemory<K>::BYTES, stream, in);
  });
}
