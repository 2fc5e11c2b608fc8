// A store that grows: the rows of every head, and what scales and ranks them, to their places in a larger one, in one launch.
#include "launch.cuh"

namespace still {

constexpr int GROW_THREADS = 256, GROW_BLOCKS = 32;  // of a block; blocks that share a head

// `count` values, several of a thread's on their way at once.
template <class T>
__device__ __forceinline__ void copy_values(T* to, const T* from, int64_t count) {
  constexpr int AHEAD = 4;
  const int64_t step = int64_t(gridDim.x) * GROW_THREADS;
  for (int64_t first = int64_t(blockIdx.x) * GROW_THREADS + threadIdx.x; first < count; first += AHEAD * step) {
    T x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (first + j * step < count) x[j] = from[first + j * step];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (first + j * step < count) to[first + j * step] = x[j];
  }
}

// The codes or values of rows, and the words that scale them, which lie behind those of all sequences.
__device__ __forceinline__ void copy_rows(void* to, const void* from, int64_t target, int64_t source, int64_t to_words, int64_t from_words,
                                          int rows, int pieces, int words) {
  copy_values(static_cast<uint4*>(to) + target * pieces, static_cast<const uint4*>(from) + source * pieces, int64_t(rows) * pieces);
  if (words == 0) return;
  copy_values(static_cast<uint32_t*>(to) + to_words + target * words, static_cast<const uint32_t*>(from) + from_words + source * words,
              int64_t(rows) * words);
}

__global__ void __launch_bounds__(GROW_THREADS) grow_store(const StillStore from, const StillStore to, const int32_t* budgets, int cap,
                                                           int retired, int pieces, int words) {
  const int kv = blockIdx.y, b = blockIdx.z, batch = gridDim.z, rows = kept_tokens(cap, budgets[kv], retired);
  const int64_t source = b * from.entries + from.offset[kv], target = b * to.entries + to.offset[kv];
  const int64_t from_words = batch * from.entries * pieces * 4, to_words = batch * to.entries * pieces * 4;
  copy_rows(to.k, from.k, target, source, to_words, from_words, rows, pieces, words);
  copy_rows(to.v, from.v, target, source, to_words, from_words, rows, pieces, words);
  if (!from.score) return;
  copy_values(to.score + target, from.score + source, rows);
  copy_values(to.token + target, from.token + source, rows);
}

}  // namespace still

extern "C" int still_grow_store(int32_t batch, int32_t kv_heads, int32_t row_bytes, int32_t row_words, const int32_t* budgets, int32_t cap,
                                int32_t retired, StillStore from, StillStore to, StillStream stream) {
  if (row_bytes <= 0 || row_bytes % 16 != 0 || row_words < 0) return cudaErrorInvalidValue;
  return still::launch(still::grow_store, dim3(still::GROW_BLOCKS, kv_heads, batch), still::GROW_THREADS, 0, stream, from, to, budgets, cap, retired,
                       row_bytes / 16, row_words);
}
