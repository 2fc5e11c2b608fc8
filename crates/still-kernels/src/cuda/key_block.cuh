// What a block of the exact branch's backward pass has of keys: which 64, which queries, and what is known of both.
#pragma once
#include "backward.cuh"

namespace still {

enum Keys { OF_WINDOW, SALIENT, CAPPED };

// A block's 64 keys, a tile of a chunk or of a KV head's salient list, and the chunks `first..last` of queries that it takes.
template <class T, Keys KEYS>
struct KeyBlock {
  static constexpr bool WINDOW = KEYS == OF_WINDOW;
  const Backward<T>& in;
  int b, kv, tile, first, last;
  int budget = 0, entries = 0;  // of the list
  int64_t bk;

  __device__ __forceinline__ explicit KeyBlock(const Backward<T>& in) : in(in), b(blockIdx.z) {
    if (WINDOW) {
      kv = blockIdx.y;
      tile = blockIdx.x;
      first = tile;
      last = min(tile + (in.flags & STILL_NO_WINDOW ? 1 : 2), in.chunks);
    } else {
      take_unit();
    }
    bk = int64_t(b) * in.kv_heads + kv;
  }
  // Token of the tile's row r; -1: none.
  __device__ __forceinline__ int token_of(int r) const {
    if (WINDOW) return tile * CHUNK + r < in.tokens ? tile * CHUNK + r : -1;
    return tile * CHUNK + r < entries ? in.routing.salient[bk * in.tokens + tile * CHUNK + r] : -1;
  }
  // The chunk that absorbs a token, the first that does not see it any more.
  __device__ __forceinline__ int absorbed_at(int token) const {
    return min(in.routing.absorbed_at[bk * in.tokens + token], uint32_t(in.chunks));
  }
  __device__ __forceinline__ int steps() const { return (last - first) * in.group; }
  // Of a step: one query head's chunk.
  __device__ __forceinline__ int chunk_of(int step) const { return first + step / in.group; }
  __device__ __forceinline__ int head_of(int step) const { return kv * in.group + step % in.group; }

 private:
  // The block's share of the work on salient keys: which of the heads' units (SalientWork) it is.
  __device__ __forceinline__ void take_unit() {
    int unit = blockIdx.x;
    SalientWork work(0, 0);
    for (kv = 0;; kv++) {
      work = SalientWork(in.routing.budgets[kv], in.chunks - 2);
      if (unit < work.units()) break;
      unit -= work.units();
    }
    budget = in.routing.budgets[kv];
    entries = budget * (in.chunks - 2);
    tile = unit / work.parts;
    const int from = tile * CHUNK / budget + 2, part = unit % work.parts;
    const int count = KEYS == CAPPED ? max(until() - from, 0) : in.chunks - from;
    first = from + count * part / work.parts;
    last = from + count * (part + 1) / work.parts;
  }
  // The chunk that sees none of the tile any more.
  __device__ __forceinline__ int until() const {
    __shared__ uint32_t until;
    if (threadIdx.x == 0) until = 0;
    __syncthreads();
    const int i = tile * CHUNK + threadIdx.x;
    const int64_t row = (int64_t(b) * in.kv_heads + kv) * in.tokens;
    if (threadIdx.x < CHUNK && i < entries) atomicMax(&until, min(in.routing.absorbed_at[row + in.routing.salient[row + i]], uint32_t(in.chunks)));
    __syncthreads();
    return int(until);
  }
};

// What the forward pass and the linear branch have left for 64 queries, in shared memory: p = 2^(logit - level).
struct __align__(16) QueryColumns {
  float level[CHUNK], delta[CHUNK], inner[CHUNK];
  int arg_max[CHUNK];

  // A thread has a query, from token `start` on.
  template <class T>
  __device__ __forceinline__ void load(const Backward<T>& in, int b, int head, int start) {
    if (threadIdx.x >= CHUNK) return;
    const int t = start + threadIdx.x;
    const int64_t at = (int64_t(b) * in.heads + head) * in.tokens + t;
    const bool on = t < in.tokens;
    level[threadIdx.x] = on ? in.maximum[at] * LOG2E + log2f(in.denominator[at]) : INFINITY;
    delta[threadIdx.x] = on ? -in.minus_delta[at] : 0.f;
    inner[threadIdx.x] = on ? in.inner[at] : 0.f;
    arg_max[threadIdx.x] = on ? in.arg_max[at] : -2;
  }
};

// Two of such a column's values.
__device__ __forceinline__ float2 two(const float* column) { return *reinterpret_cast<const float2*>(column); }
__device__ __forceinline__ int2 two(const int* column) { return *reinterpret_cast<const int2*>(column); }

// The two keys of a lane.
template <class T, Keys KEYS>
struct LaneKeys {
  int row, token[2];               // the first's row of the tile; -1: none
  int absorbed_at[2] = {0, 0};     // CAPPED: the chunks that do not see them any more

  __device__ __forceinline__ explicit LaneKeys(const KeyBlock<T, KEYS>& at) : row(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {
    token[0] = at.token_of(row);
    token[1] = at.token_of(row + 8);
    if constexpr (KEYS == CAPPED)
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (token[half] >= 0) absorbed_at[half] = at.absorbed_at(token[half]);
  }
};

}  // namespace still
