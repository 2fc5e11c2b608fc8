// The C interface of the kernels: what a Rust FFI, a Python harness or anything else may call.
//
// Every function queues work on `stream` and returns a cudaError_t as an int (0: queued). Nothing is allocated: scratch is
// the caller's. A chunk is 64 tokens. Shapes are written outermost first; B sequences, H query heads, K KV heads, N tokens,
// D channels (64, 80, 96 or 128), C = ceil(N / 64) chunks, R = max(C - 2, 0) chunks that retire within the sequence.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void* StillStream;  // a cudaStream_t

enum { STILL_F32 = 0, STILL_BF16 = 1 };

// How a state keeps the rows of salient tokens: as they come, or as codes (codes.cuh).
enum { STILL_PLAIN = 0, STILL_INT8 = 1, STILL_INT4 = 2 };

typedef struct {
  int32_t batch, heads, kv_heads, tokens, head_dim;
  int32_t dtype;  // of q, k, v, the output, the maps and all scratch that is not said to be f32
  int32_t flags;  // what the attention is made of, where it is another than by default; 0
} StillShape;

enum {
  STILL_SOFTMAX_MAP = 1,  // phi(x) = [softmax(x W); softmax(-x W)], not the NP-Map
  STILL_SUM = 2,          // lambda = exp(l), not exp(l) / max(n, 1)
  STILL_NO_WINDOW = 4,    // of its own chunk and the one before a query sees its own token alone
  STILL_NO_SALIENT = 8,   // no query sees kept tokens outside its window
  STILL_NO_LINEAR = 16    // lambda = 0, and the linear state is empty to routers
};

// Rows of `head_dim` adjacent elements, every row 16-byte aligned; strides in elements.
typedef struct {
  void* data;
  int64_t batch, head, token;
} StillRows;

// Segments of the state scan: `totals` holds that many states of one (sequence, KV head).
int still_segments(const StillShape* shape);

// Self-Saliency Scores, mean over the group: `score` f32 [B, K, N].
int still_saliency(const StillShape* shape, StillRows q, StillRows k, float* score, StillStream stream);

// What tokens are ranked by.
enum { STILL_SELF_SALIENCY = 0, STILL_RECEIVED_ATTENTION = 1, STILL_SELF_RECALL = 2, STILL_FIRST_TOKENS = 3, STILL_RANDOM = 4, STILL_NO_ROUTER = 5 };
typedef struct {
  int32_t kind, layer;  // `layer` and `seed` are words of the random router's hash
  uint64_t seed;
} StillRouter;

// The maps' matrices as everything below takes them: in the shape's dtype, reflections folded in. `w_q` f32 [H, D, D], `w_k` f32 [K, D, D];
// the vectors f32 [H, D] and [K, D] that they reflect by, or null: none.
int still_fold(const StillShape* shape, const float* w_q, const float* w_k, const float* u_q, const float* u_k, void* folded_q,
               void* folded_k, StillStream stream);

// Top `budgets[K]` of each whole chunk. `selected` [B, K, C]: bit t is token t of the chunk (0 for a chunk that is not
// whole); `salient` [B, K, N]: the tokens in order, budget of them a chunk. `absorbed_at`: as StillRouting's, without a cap; null: not
// wanted.
int still_select(const StillShape* shape, const float* score, const int32_t* budgets, uint64_t* selected, int32_t* salient,
                 uint32_t* absorbed_at, StillStream stream);

// What sequences continue: states (StillDecode) of chunks that had retired and a ring. The tokens of a call are then those of the
// ring that had not retired and the new ones behind them, padded to `tokens` of the shape; outputs of the ring's tokens and of
// padding mean nothing. Rows of k and v before token 0 are those that the state had stored: negative numbers stand for them, -n to
// -1 where a head had n. Where a state keeps codes, they lie with the rows of all tokens as codes would give them back, further
// behind (StillRouting's `rounded`).
typedef struct {
  const int32_t* retired;  // [B]: chunks that had retired
  const int32_t* ring;     // [B]: tokens of the ring that have not, at most 128
  const int32_t* tokens;   // [B]: those and the new ones
  int32_t stored;          // the most rows that a head of a sequence had stored
  // Under a cap that is reached, what heads had stored, by rank (else null; still_past_rows writes them): [B, K, stored] each.
  float* stored_score;
  int32_t *stored_token, *stored_place;  // position in the sequence, row of the head's store
  const void *stored_k, *stored_v;       // copies of the stores, where they hold codes; else null
  const float *s, *z;      // the states' S and z; of several segments (still_segments) copies, as the last are left where they were
} StillPast;

// No cap.
#define STILL_NO_CAP INT32_MAX

// What was routed. Under a cap a head never has more salient tokens than that: at each retirement the lowest scores, ties to the
// earlier, are demoted into the state. Then no budget is above the cap, and no head keeps everything.
typedef struct {
  const int32_t* budgets;       // [K]
  const uint64_t* selected;     // [B, K, C]
  const int32_t* salient;       // [B, K, stored + N]
  const int32_t* retired;       // [B]: chunks that had retired before a call that continues states (StillPast); null: none
  int32_t stored;               // as StillPast's; 0
  int32_t rounded;              // salient tokens' rows of k and v lie so many rows behind those of the window; 0: they are the same
  int32_t cap;                  // STILL_NO_CAP: the rest is null
  const uint32_t* absorbed_at;  // [B, K, N]: the chunk that first finds a token in the state; UINT32_MAX: none does
  const int32_t* visible;       // [B, K, C, cap]: the salient tokens that a chunk sees, min(cap, (chunk - 1) budget) of them
  // [B, K, R, 64]: the tokens of the retired chunks in the order in which they enter the state, those of chunk c + 2 in entry c;
  // the places that are left hold ~t of the tokens t that never do (INT32_MIN where a state is continued: negative numbers are then
  // what it had stored). The salient set never shrinks, so 64 a chunk are enough.
  const int32_t* order;
} StillRouting;

// The last three of StillRouting from what still_select gave. `cap` is 1 or more. Where a state is continued (`past`, else null)
// `absorbed_at` is null.
int still_demote(const StillShape* shape, const float* score, const int32_t* budgets, const uint64_t* selected, const int32_t* salient,
                 int32_t cap, uint32_t* absorbed_at, int32_t* visible, int32_t* order, const StillPast* past, StillStream stream);

// phi(k) of tokens that will be absorbed, zeros of the others: `phi` [B, K, N, 2D], under a cap in the rows of `order` (the last
// two chunks' are not written). `w` [K, D, D]. Here and in still_states heads whose budget is 64 without a cap are left out, as
// nothing of them is absorbed: their parts of the results are not written.
int still_map_keys(const StillShape* shape, StillRows k, const void* w, const StillRouting* routing, void* phi, StillStream stream);

// Prefix states: `s` [B, K, R, 2D, D] and `z` f32 [B, K, R, 2D]; entry c sums chunks 0..=c, which chunk c + 2 sees.
// `totals` f32 [segments, B, K, 2D, D + 1]. `s_last` f32 [B, K, 2D, D] and `z_last` f32 [B, K, 2D]: the last entry (not written
// if R = 0), to decode from; null if not wanted. Where states are continued (`past`, else null) they are added to each entry and
// are an entry of their own before the others, [B, K, R + 1, …], which chunk 1 sees; the last entry is each sequence's own.
int still_states(const StillShape* shape, const void* phi, StillRows v, const StillRouting* routing, float* totals, void* s, float* z,
                 float* s_last, float* z_last, const StillPast* past, StillStream stream);

// What the forward pass reads and writes.
typedef struct {
  StillRows q, k, v, out;
  const void* w_q;           // [H, D, D]
  const float* log_scale;    // [H]: lambda = exp(l) / max(n, 1), see STILL_SUM; null: lambda = 1
  StillRouting routing;
  const void* s;             // prefix states
  const float* z;
  float* denominator;        // [B, H, N]
  float* maximum;            // [B, H, N]: m, in units of the logits; the last two may be null (nothing to train)
  int32_t* arg_max;          // [B, H, N]: the token whose logit is m
  int32_t first_chunk;       // chunks before it are not answered
  // A factor on each channel of the linear branch's numerator, [B, H, tokens, D]; null data: ones. Of tokens `gate_from[b]` until
  // `gate_until[b]` alone, its rows from 0 on; null: of all.
  StillRows gate;
  const int32_t *gate_from, *gate_until;
  StillRows linear;          // with a gate: the numerator without it, for the backward pass; null data: not wanted
} StillForward;

// Both branches. `out` and `denominator` carry the linear one's share from the first kernel to the second.
int still_forward(const StillShape* shape, const StillForward* args, StillStream stream);
int still_linear_forward(const StillShape* shape, const StillForward* args, StillStream stream);
int still_exact_forward(const StillShape* shape, const StillForward* args, StillStream stream);

// What the backward pass reads and writes; the forward pass has left `out` to `arg_max`. Everything but the selection and the
// states is recomputed. Nothing depends on the order in which blocks run.
typedef struct {
  StillRows q, k, v, out, d_out, d_q, d_k, d_v;
  const void *w_q, *w_k;
  const float* log_scale;
  StillRouting routing;
  const void* phi;           // of the keys
  const void* s;
  const float *z, *denominator, *maximum;
  const int32_t* arg_max;
  float *d_w_q, *d_w_k;      // [H, D, D], [K, D, D]
  float* d_log_scale;        // [H]; null if `log_scale` is
  const int32_t* host_budgets;  // the budgets, where the caller of these functions can read them
  // With a gate: what the forward pass has left, the gate times d_out, and the gate's gradient. Else `d_linear` is `d_out` and the
  // others have null data.
  StillRows linear, d_linear, d_gate;
  void* scratch;             // still_backward_bytes, 256-byte aligned; nothing is kept in it between calls
} StillBackward;

int64_t still_backward_bytes(const StillShape* shape, const int32_t* host_budgets);
int still_backward(const StillShape* shape, const StillBackward* args, StillStream stream);
// Its steps, in order, to be timed one by one.
enum { STILL_STEP_LINEAR, STILL_STEP_QUERIES, STILL_STEP_WINDOW, STILL_STEP_SALIENT, STILL_STEP_STATES, STILL_STEP_ABSORBED,
       STILL_STEP_MAPS, STILL_STEPS };
int still_backward_step(const StillShape* shape, const StillBackward* args, int32_t step, StillStream stream);

// The salient tokens of all sequences and heads.
typedef struct {
  void *k, *v;            // [B, entries, D], a head's in order without a cap; or codes
  float* score;           // [B, entries]: what they were ranked by; null without a cap, and so is the next
  int32_t* token;         // [B, entries]: their positions
  const int64_t* offset;  // [K]: where a head's begin
  int64_t entries;        // of a sequence
} StillStore;

// The state of one sequence, where sequences of a step have one each: in place of what StillDecode says, which has the same names. It
// is a batch of one.
typedef struct {
  const void *w_q, *w_k;
  const float* log_scale;
  const int32_t* budgets;
  void *ring_k, *ring_v;
  float* ring_score;
  const StillStore* store;
  float *s, *z;
} StillSequenceState;

// The recurrent state of one layer and one step of it. `shape.tokens` is 1. All lengths are read on the device, so that a step
// can be captured in a graph once and replayed for every token.
typedef struct {
  StillRows q, k, v, out;       // the new token's rows (token stride unused)
  const void *w_q, *w_k;
  const float* log_scale;
  const int32_t* budgets;       // [K]
  int32_t cap;                  // STILL_NO_CAP: none
  const int32_t* positions;     // [B]: of the new token, from 0; negative: the sequence is idle
  void *ring_k, *ring_v;        // [B, K, 128, D]: token t at t % 128
  float* ring_score;            // [B, K, 128]
  const StillStore* store;      // in the device's memory: a step that was captured finds a store that has moved
  int32_t coding;               // how its rows are kept
  const float* key_scale;       // [K, D]: powers of two that a coded key's channels are multiplied by when it is read; null: ones
  uint64_t* admitted;           // [B, K]: scratch; null without a cap
  float *s, *z;                 // f32 [B, K, 2D, D], [B, K, 2D]; zeros at first
  float* partial;               // scratch, still_decode_floats
  uint32_t* arrived;            // [B, K], zeros at first; every step leaves zeros
  int32_t splits;               // blocks that share a head's store, 1 to 64
  StillRows gate;               // as StillForward's, of the new token
  StillRouter router;
  const float *cos, *sin;       // [B, rotary / 2]: q and k go through RoPE first; null: they have
  int32_t rotary;               // channels of a head that are rotated, a multiple of 16
  const StillSequenceState* states;  // [B], on the device: those of idle sequences are not read; null: all have the one state above
} StillDecode;

// The scores f32 [B, K, N] of a router by which nothing of the linear state matters (STILL_SELF_RECALL: nothing is queued). Where
// states are continued (`past` and `state`, else null), of all tokens since the ring's first; those of the ring's tokens that are
// final may be left to still_past_select. `partial`: scratch f32 [B, K, C, 128], with STILL_RECEIVED_ATTENTION.
int still_scores(const StillShape* shape, const StillRouter* router, StillRows q, StillRows k, const StillPast* past, const StillDecode* state,
                 float* partial, float* score, StillStream stream);

// What still_select, still_demote (under a cap) and still_past_select do, by the router STILL_SELF_RECALL: a token's score is the
// error of recalling its value from the linear state before the token enters it, and what was kept is scored anew whenever a chunk
// retires. `s` and `z`: scratch f32 [B, K, 2D, D] and [B, K, 2D], which begin as the states do. `score` gets what each token had when
// its chunk retired, 0 of the others. `routing` says which buffers to fill: `absorbed_at` if it is not null, `order` and `visible` under
// a cap, at most 8,192.
int still_recall(const StillShape* shape, StillRows k, StillRows v, const void* w, const StillRouting* routing, const StillPast* past, float* s,
                 float* z, float* score, StillStream stream);

// What heads have stored after `retired` chunks, at most, to their places in a larger store. A row is `row_bytes` of values or codes, a
// multiple of 16, and `row_words` words that scale codes.
int still_grow_store(int32_t batch, int32_t kv_heads, int32_t row_bytes, int32_t row_words, const int32_t* budgets, int32_t cap, int32_t retired,
                     StillStore from, StillStore to, StillStream stream);

int64_t still_decode_floats(const StillShape* shape, int32_t splits);
// Retires the chunk two before (at the first token of a chunk), appends the token, scores it, answers it. A retirement may
// write to the ring's rows of the chunk that retires.
int still_decode(const StillShape* shape, const StillDecode* args, StillStream stream);
// Fills ring and store, of rows as they come, from a sequence that was read at once: `shape` is that sequence's, `k` and `v` its rows, `routing`
// and `score` its own (of a cap that is nowhere reached it need know nothing). S and z come from still_states.
int still_decode_fill(const StillShape* shape, StillRows k, StillRows v, const float* score, const StillRouting* routing,
                      const StillDecode* args, StillStream stream);

// Queries, keys and values of a call that continues `state`: `q` [B, H, N, D], zeros but for new tokens; `k` and `v` [B, K,
// stored + N, D], from token 0 on, or [B, K, N + stored + N, D] with `rounded` = N + stored. The new tokens' rows are `state->q`,
// `k` and `v`.
int still_past_rows(const StillShape* shape, const StillPast* past, const StillDecode* state, StillRows q, StillRows k, StillRows v,
                    int32_t rounded, StillStream stream);

// still_select where a state is continued: the ring's scores are copied to `score` first. `salient` is [B, K, stored + N]: the
// stored rows, then the tokens.
int still_past_select(const StillShape* shape, const StillPast* past, const StillDecode* state, float* score, uint64_t* selected,
                      int32_t* salient, StillStream stream);

// The states after such a call, but for S and z, which come from still_states.
int still_past_fill(const StillShape* shape, const StillPast* past, const StillDecode* state, StillRows k, StillRows v, const float* score,
                    const StillRouting* routing, StillStream stream);

// The feature map of linear attention alone, all f32: `phi` [rows, 2 width] = [softmax(u); softmax(-u)] of `f` = x W [rows, width],
// where u is f, or |x| f / |f| if `x` [rows, d] is not null.
int still_features(int64_t rows, int32_t width, int32_t d, const float* f, const float* x, float* phi, StillStream stream);

// Its gradients: `d_f` [rows, width], and `d_x` [rows, d] through |x| alone (null: not wanted).
int still_features_backward(int64_t rows, int32_t width, int32_t d, const float* f, const float* x, const float* phi,
                            const float* d_phi, float* d_f, float* d_x, StillStream stream);

#ifdef __cplusplus
}
#endif
