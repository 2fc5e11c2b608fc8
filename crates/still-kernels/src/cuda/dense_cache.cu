// New rows of keys and values to the cache of dense attention, and back what its codes stand for.
#include "codes.cuh"
#include "dense.cuh"

namespace still {

constexpr int APPEND_THREADS = 256;

template <class T>
struct DenseAppend {
  Rows<const T> k, v;
  Rows<T> keys, values;
  const int32_t *starts, *lengths;
};

// Sixteen bytes a thread at a time.
template <class T>
__global__ void __launch_bounds__(APPEND_THREADS) dense_append(const DenseAppend<T> in, int d) {
  const int b = blockIdx.z, kv = blockIdx.y / 2, pieces = d * int(sizeof(T)) / 16;
  const bool is_value = blockIdx.y % 2;
  const int64_t start = in.starts[b], count = int64_t(in.lengths[b]) * pieces;
  const Rows<const T>& from = is_value ? in.v : in.k;
  const Rows<T>& to = is_value ? in.values : in.keys;
  for (int64_t i = int64_t(blockIdx.x) * APPEND_THREADS + threadIdx.x; i < count; i += int64_t(gridDim.x) * APPEND_THREADS) {
    const int64_t t = i / pieces, piece = i % pieces;
    reinterpret_cast<uint4*>(to.row(b, kv, start + t))[piece] = reinterpret_cast<const uint4*>(from.row(b, kv, t))[piece];
  }
}

// Rows, of keys or of values as `blockIdx.y` says, and where their codes are kept.
template <class T>
struct DenseCodes {
  Rows<T> k, v;
  StillDenseCache cache;
  const int32_t *starts, *lengths;
  int tokens;

  // This warp's first row, and how many rows the next one is away.
  __device__ __forceinline__ int64_t first() const { return int64_t(blockIdx.x) * (APPEND_THREADS / 32) + threadIdx.x / 32; }
  __device__ __forceinline__ int64_t step() const { return int64_t(gridDim.x) * (APPEND_THREADS / 32); }
  __device__ __forceinline__ T* row(int64_t t) const { return (blockIdx.y % 2 ? v : k).row(blockIdx.z, blockIdx.y / 2, t); }
  __device__ __forceinline__ CodedRows codes(int d) const {
    const bool is_value = blockIdx.y % 2;
    const StillRows& rows = is_value ? cache.v : cache.k;
    const int64_t first = blockIdx.z * rows.batch + blockIdx.y / 2 * rows.head;
    uint32_t* const words = is_value ? cache.v_words : cache.k_words;
    return CodedRows(static_cast<uint8_t*>(rows.data) + first, words + first / code_bytes(cache.coding, d) * code_words(cache.coding, d),
                     cache.coding, d, !is_value);
  }
};

// A warp codes a row.
template <class K>
__global__ void __launch_bounds__(APPEND_THREADS) dense_encode(const DenseCodes<typename K::T> in) {
  const CodedRows to = in.codes(K::D);
  const int start = in.starts[blockIdx.z], length = in.lengths[blockIdx.z];
  for (int64_t t = in.first(); t < length; t += in.step()) {
    WarpRow<code_groups(K::D)> x;
    x.load(in.row(t), K::D);
    x.encode(to, start + t);
  }
}

template <class K>
__global__ void __launch_bounds__(APPEND_THREADS) dense_widen(const DenseCodes<typename K::T> in) {
  const CodedRows from = in.codes(K::D);
  const int end = in.starts[blockIdx.z] + in.lengths[blockIdx.z];
  for (int64_t t = in.first(); t < in.tokens; t += in.step()) {
    WarpRow<code_groups(K::D)> x = {};
    if (t < end) x.decode(from, t);
    x.store(in.row(t), K::D);
  }
}

template <class T>
DenseCodes<T> dense_codes(const StillShape& shape, const StillDenseAppend& args) {
  return {Rows<T>(args.k), Rows<T>(args.v), args.cache, args.starts, args.lengths, shape.tokens};
}

// Blocks for all keys and values of a shape, `rows` of them a block.
inline dim3 append_grid(const StillShape& shape, int64_t rows) {
  const int64_t blocks = (shape.tokens + rows - 1) / rows;
  return dim3(unsigned(blocks < 256 ? blocks : 256), 2 * shape.kv_heads, shape.batch);
}

inline bool has_codes(const StillDenseCache& cache) {
  return (cache.coding == STILL_INT8 || cache.coding == STILL_INT4) && cache.k_words && cache.v_words;
}

}  // namespace still

extern "C" int still_dense_append(const StillShape* shape, const StillDenseAppend* args, StillStream stream) {
  const bool plain = args->cache.coding == STILL_PLAIN;
  if (!plain && !still::has_codes(args->cache)) return cudaErrorInvalidValue;
  return still::dense_dispatch(*shape, [&](auto kind) -> int {
    using K = decltype(kind);
    using T = typename K::T;
    using still::Rows;
    constexpr int WARPS = still::APPEND_THREADS / 32, PIECES = K::D * int(sizeof(T)) / 16;
    if (!plain)
      return still::launch(still::dense_encode<K>, still::append_grid(*shape, WARPS), still::APPEND_THREADS, 0, stream,
                           still::dense_codes<T>(*shape, *args));
    const still::DenseAppend<T> in{Rows<const T>(args->k), Rows<const T>(args->v), Rows<T>(args->cache.k), Rows<T>(args->cache.v),
                                   args->starts, args->lengths};
    return still::launch(still::dense_append<T>, still::append_grid(*shape, still::APPEND_THREADS / PIECES), still::APPEND_THREADS, 0,
                         stream, in, K::D);
  });
}

extern "C" int still_dense_widen(const StillShape* shape, const StillDenseAppend* args, StillStream stream) {
  if (!still::has_codes(args->cache)) return cudaErrorInvalidValue;
  return still::dense_dispatch(*shape, [&](auto kind) -> int {
    using K = decltype(kind);
    constexpr int WARPS = still::APPEND_THREADS / 32;
    return still::launch(still::dense_widen<K>, still::append_grid(*shape, WARPS), still::APPEND_THREADS, 0, stream,
                         still::dense_codes<typename K::T>(*shape, *args));
  });
}
