// The keys and values that one chunk's queries see exactly, in stages of 64 tokens: the window (the chunk before, this one), then
// the salient list, which is looked up meanwhile.
#pragma once
#include "launch.cuh"

namespace still {

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
