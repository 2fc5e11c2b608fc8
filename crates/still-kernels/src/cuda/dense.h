// The C interface of the kernels of dense attention: softmax over every earlier token, onto a cache of keys and values.
//
// As in still.h every function queues work on `stream`, allocates nothing and returns a cudaError_t as an int. `dtype` of the
// shape is that of all rows. A cache's rows lie as [B, K, room, D], token t of a sequence at t; what lies behind the last token
// is never read. It may hold codes of them instead (codes.cuh), whose strides are bytes, and apart from those the words that scale
// them: of 4 bits in f32 alone.
#pragma once
#include "still.h"

#ifdef __cplusplus
extern "C" {
#endif

// Blocks that share a (sequence, KV head), at most.
#define STILL_DENSE_SPLITS 64

// The cache of a batch.
typedef struct {
  StillRows k, v;
  uint32_t *k_words, *v_words;  // [B, K, room, words of a row]; null: there are no codes
  int32_t coding;               // how its rows are kept
} StillDenseCache;

// The cache of one sequence, where sequences of a step have one each: [1, K, room, D].
typedef struct {
  void *k, *v;
  uint32_t *k_words, *v_words;
  int64_t head;  // from one head to the next, in elements; of codes in bytes
} StillDenseSequence;

// One token of every sequence. `shape.tokens` is 1; D is 64, 80, 96, 128 or 256. All lengths are read on the device, so that a
// step can be captured in a graph once and replayed for every token.
typedef struct {
  StillRows q, k, v, out;      // the new token's rows (token stride unused)
  StillDenseCache cache;       // the new token's are written; as codes are then read
  const float *cos, *sin;      // [B, rotary / 2]: q and k go through RoPE first; null: they have
  int32_t rotary;              // channels of a head that are rotated, a multiple of 16
  const int32_t* positions;    // [B]: of the new token, from 0; negative: the sequence is idle, and its output is not written
  float* partial;              // scratch, still_dense_decode_floats
  uint32_t* arrived;           // [B, H], zeros at first; every step leaves zeros
  int32_t splits;              // blocks that share a (sequence, KV head), 1 to STILL_DENSE_SPLITS
  const StillDenseSequence* caches;  // [B], on the device, in place of the rows of `cache`: those of idle sequences are not read; or null
} StillDenseDecode;
int64_t still_dense_decode_floats(const StillShape* shape, int32_t splits);
int still_dense_decode(const StillShape* shape, const StillDenseDecode* args, StillStream stream);

// Copies new tokens behind what sequences have: the first `lengths` of `shape.tokens` rows of each, from row `starts` on.
// D is 64, 80, 96, 128 or 256.
typedef struct {
  StillRows k, v;
  StillDenseCache cache;
  const int32_t *starts, *lengths;  // [B]
} StillDenseAppend;
int still_dense_append(const StillShape* shape, const StillDenseAppend* args, StillStream stream);

// What the codes of the first `shape.tokens` rows stand for, to `k` and `v`: zeros behind the `starts` + `lengths` of a sequence.
int still_dense_widen(const StillShape* shape, const StillDenseAppend* args, StillStream stream);

// `shape.tokens` tokens of every sequence, whose keys and values are in the cache: token t sees the cache up to `starts` + t.
// D is 64, 80, 96 or 128, in bf16 256 too. Outputs of padding, t >= `lengths`, are zeros.
typedef struct {
  StillRows q, cache_k, cache_v, out;
  const int32_t *starts, *lengths;  // [B]; null: 0, and all tokens
} StillDenseForward;
int still_dense_forward(const StillShape* shape, const StillDenseForward* args, StillStream stream);

#ifdef __cplusplus
}
#endif
