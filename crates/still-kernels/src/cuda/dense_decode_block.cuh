// What the stages of `dense_decode` share: its arguments, a block's place in the work, and its shared memory.
#pragma once
#include <type_traits>
#include "decode_group.cuh"
#include "dense.cuh"
#include "early.cuh"

namespace still {

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
        slices((group + GROUP - 1) / GROUP), caches(a.caches) {}

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

  // Of a sequence.
  __device__ __forceinline__ StepRope rope(int b) const { return {cos ? cos + b * half : nullptr, sin + b * half, half}; }
};

// Dynamic shared memory: stages of 64 keys and 64 values each, and the queries. When the stages are done with, the sums of the
// four warps take their place, and then what the last block adds up all from: sums, and the maxima and weights that they have.
template <class K>
struct DenseMemory {
  using Stage = Tile<K::P, 128, K::D>;
  using Queries = Tile<K::P, GROUP, K::D>;
  static constexpr int STAGES = K::P == 1 ? (K::D <= 64 ? 4 : 2) : (K::D <= 128 ? 2 : 1);
  static constexpr int BYTES = STAGES * Stage::BYTES + Queries::BYTES;
  static constexpr int BLOCKS = 227 * 1024 / (BYTES + 4096);  // of a multiprocessor: Hopper's shared memory has room for them
  static constexpr int TOPS = GROUP * K::D;  // where they begin, in floats
  static_assert(STAGES * Stage::BYTES >= 4 * GROUP * K::D * 4);
  static_assert(STAGES * Stage::BYTES >= 4 * (TOPS + 2 * TOPS / 4) && TOPS >= 4 * DECODE_THREADS);

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
    const int first = blockIdx.y % in.slices * GROUP;
    head = kv * in.group + first;
    heads = min(GROUP, in.group - first);
    const int tiles = position / CHUNK + 1, share = max(DENSE_SHARE, (tiles + in.splits - 1) / in.splits);
    used = (tiles + share - 1) / share;
    begin = blockIdx.x * share;
    end = min(begin + share, tiles);
  }
};

}  // namespace still
