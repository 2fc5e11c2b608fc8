// The keys and values that one chunk's queries see exactly, in stages of 64 tokens: the window (the chunk before, this one), then
// the salient list, which is looked up meanwhile.
#pragma once
#include "launch.cuh"

namespace still {

// A block's chunk of queries, of HEADS query heads of one KV head, and what they see. Four warps share a head. Blocks begin with the
// last chunks, which see most.
template <int HEADS>
struct QueryBlock {
  static constexpr int THREADS = HEADS * 128;
  int b, kv, chunk, start;              // `start`: its first token
  int first_head, head, first;          // of the block's heads; of this warp: its head; of this lane: the first of its two queries
  int kept, window, seen, stages;       // salient tokens of its KV head; stages of the window; salient tokens that it sees; stages in all
  bool linear;                          // whether anything is absorbed
  const int32_t* list;                  // the salient tokens that it sees

  // `in`: arguments of a pass. `earlier`: chunks that had retired before the sequence.
  template <class In>
  __device__ __forceinline__ QueryBlock(const In& in, int earlier)
      : b(blockIdx.z), kv(blockIdx.x / (in.group / HEADS)), chunk(in.chunks - 1 - blockIdx.y), start(chunk * CHUNK),
        first_head(kv * in.group + blockIdx.x % (in.group / HEADS) * HEADS), head(first_head + threadIdx.x / 128),
        first(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4) {
    const int retired = earlier + max(chunk - 1, 0);
    kept = kept_tokens(in.routing.cap, in.routing.budgets[kv], retired);
    linear = retired * CHUNK > kept;
    window = window_chunks(in.flags, chunk);
    seen = in.flags & STILL_NO_SALIENT ? 0 : kept;
    stages = window + (seen + CHUNK - 1) / CHUNK;
    list = visible_list(in.routing, int64_t(b) * in.kv_heads + kv, chunk, in.chunks, in.tokens);
  }

  // The chunk's rows of the block's heads, a head after the other. Does not commit.
  template <class T, class TILE>
  __device__ __forceinline__ void load(TILE to, const Rows<T>& rows, int tokens) const {
#pragma unroll
    for (int h = 0; h < HEADS; h++)
      load_matrix<THREADS, CHUNK>(to, h * CHUNK, rows.row(b, first_head + h, start), rows.token, tokens - start);
  }

  // Whether stage i is the chunk itself, whose later keys a query does not see; or salient tokens, and not 64 of them.
  __device__ __forceinline__ bool is_own(int i) const { return i == window - 1; }
  __device__ __forceinline__ bool is_ragged(int i) const { return i >= window && (i - window + 1) * CHUNK > seen; }

  // The lane's query in its row `half`, as a token of the chunk.
  __device__ __forceinline__ int row(int half) const { return first + half * 8; }
};

template <class T, int D, int THREADS>
struct KeyStream {
  static constexpr int PIECES = D / 8, PER_THREAD = (CHUNK * PIECES + THREADS - 1) / THREADS;
  Rows<const T> k, v;
  const int32_t* list;
  int b, kv, start, kept, all, window, stages;  // stages of the window, and in all
  int rounded = 0;                              // StillRouting's
  int tokens[PER_THREAD];  // that this thread copies next, looked up one stage ahead of the copy

  __device__ __forceinline__ void look_up(int i) {
    const bool is_salient = i >= window;
    const int from = is_salient ? (i - window) * CHUNK : start - (window - 1 - i) * CHUNK, to = is_salient ? kept : all;
#pragma unroll
    for (int j = 0; j < PER_THREAD; j++) {
      int t = from + (threadIdx.x + j * THREADS) / PIECES;
      tokens[j] = i < stages && t < to ? (is_salient ? list[t] + rounded : t) : NO_TOKEN;
    }
  }

  // Copies stage i (looked up before) to rows 0..64 (keys) and 64..128 (values), commits, and looks up the next.
  template <class STAGE>
  __device__ __forceinline__ void load(int i, STAGE to) {
    if (i < stages) {
      const T *keys = k.row(b, kv, 0), *values = v.row(b, kv, 0);
#pragma unroll
      for (int j = 0; j < PER_THREAD; j++) {
        const int piece = threadIdx.x + j * THREADS, row = piece / PIECES, col = piece % PIECES * 8;
        if (CHUNK * PIECES % THREADS != 0 && row >= CHUNK) break;
        copy_piece(to, row, col, tokens[j] == NO_TOKEN ? nullptr : keys + tokens[j] * k.token + col, k.data);
        copy_piece(to, CHUNK + row, col, tokens[j] == NO_TOKEN ? nullptr : values + tokens[j] * v.token + col, v.data);
      }
    }
    copy_commit();
    look_up(i + 1);
  }
};

}  // namespace still
