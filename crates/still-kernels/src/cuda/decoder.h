// The C interface of the decoder's own kernels: what a layer does beside attention, and the loss over the vocabulary.
//
// As in still.h every function queues work on `stream`, allocates nothing and returns a cudaError_t as an int. Tensors are
// contiguous, of `dtype` (STILL_F32 or STILL_BF16) where nothing else is said; sums are f32.
#pragma once
#include "still.h"

#ifdef __cplusplus
extern "C" {
#endif

// hidden = silu(gate) * up, `count` values.
int still_swiglu(int32_t dtype, int64_t count, const void* gate, const void* up, void* hidden, StillStream stream);

// Its gradients. `d_up` may be `d_hidden`.
int still_swiglu_backward(int32_t dtype, int64_t count, const void* gate, const void* up, const void* d_hidden, void* d_gate,
                          void* d_up, StillStream stream);

// sum = x + y, `count` values.
int still_residual(int32_t dtype, int64_t count, const void* x, const void* y, void* sum, StillStream stream);

// y = x / sqrt(mean(x^2) + eps) * weight, `rows` rows of `width` values, a multiple of 8.
int still_rms_norm(int32_t dtype, int64_t rows, int32_t width, const void* x, const void* weight, float eps, void* y, StillStream stream);

// d_x = add + the gradient of x / sqrt(mean(x^2) + eps) * weight, `rows` rows of `width` values; `add` may be null or d_x.
int still_rms_norm_backward(int32_t dtype, int64_t rows, int32_t width, const void* x, const void* weight, float eps,
                            const void* d_y, const void* add, void* d_x, StillStream stream);

// Half rotation of `from` [B, H, N, D] into `to`: channel i with i + D/2, by cos and sin f32 [runs, N, D/2], of one run for
// all sequences or of one each; `sign` -1 rotates back.
typedef struct {
  int32_t batch, heads, tokens, head_dim, runs;
  int32_t dtype;
  float sign;
} StillRotation;
int still_rotate(const StillRotation* rotation, StillRows from, StillRows to, const float* cos, const float* sin,
                 StillStream stream);

// What still_rotate rotates by: `cos` and `sin` [rows, half] of positions [rows] times frequencies [half], in radians, times `scale`.
// Angles are f64.
int still_rope_angles(int64_t rows, int32_t half, const uint32_t* positions, const double* frequencies, double scale, float* cos, float* sin,
                      StillStream stream);

// Of rows of logits over the vocabulary: `losses` f32 [rows] and the gradient of their sum with other weights.
//   loss  = kl.share * KL(softmax(teacher) || softmax(student)) - next.share * there * ln softmax(student)[id]
//   d     = kl.weight * (softmax(student) - softmax(teacher)) + next.weight * there * (softmax(student) - onehot(id))
typedef struct {
  int64_t rows;
  int32_t vocab;
  int32_t dtype;               // of d_logits
  const float *student, *teacher;  // [rows, vocab]; teacher may be null: no divergence
  const uint32_t* ids;         // [rows]; null: no next token
  const float* there;          // [rows]: 0 where no token comes next; null with ids
  float kl_share, kl_weight, next_share, next_weight;
  float* losses;
  void* d_logits;              // [rows, vocab]
} StillVocabularyLoss;
int still_vocabulary_loss(const StillVocabularyLoss* args, StillStream stream);

// How a matrix is stored: values row by row, or in blocks as quantized.cuh describes them.
#define STILL_PLAIN 0
#define STILL_Q8_0 1
#define STILL_Q4_0 2
#define STILL_Q4_1 3
#define STILL_Q4_K 4
#define STILL_Q6_K 5
#define STILL_E4M3 6

// Products of a small batch, 1 to STILL_SMALL_BATCH_ROWS, with `count` matrices of equal width, at most STILL_FACTORS:
//   to = n(x) weight^T + update_scale * low update^T + bias + add
// where n(x) is x, or x / sqrt(mean(x^2) + eps) * norm. Gated, with two matrices of one format: silu(first) * second into the
// first's `to`, without their updates. What there is not is null; `inner` is a multiple of 8. Where all matrices are in blocks,
// rows are 1 to 4, of bf16 to STILL_QUANTIZED_ROWS.
#define STILL_SMALL_BATCH_ROWS 3
#define STILL_QUANTIZED_ROWS 8
#define STILL_FACTORS 4
typedef struct {
  int32_t dtype, weight_dtype, to_dtype;  // the last two: dtype, or STILL_F32
  int32_t rows, inner, count, gated;
  float eps;
  const void* x;     // [rows, inner]
  const void* norm;  // [inner] of dtype
} StillSmallBatchProducts;
typedef struct {
  int32_t out, rank, format;
  float update_scale;
  const void* weight;         // [out, inner], of weight_dtype if it is plain
  const void* bias;           // [out] of dtype
  const void* add;            // [rows, out] of dtype
  const float *update, *low;  // [out, rank], [rows, rank]
  void* to;                   // [rows, out] of to_dtype
} StillFactor;
int still_small_batch_products(const StillSmallBatchProducts* args, const StillFactor* factors, StillStream stream);

// 32-bit words of a matrix in blocks; 0 if there is no such format.
int64_t still_quantized_words(int32_t format, int32_t rows, int32_t columns);

// Values of a matrix in blocks, of `dtype`: of `count` rows from `first` on, or of those that `ids` names; `columns` is a
// multiple of 4, those of a format with 256 columns a block of 256.
typedef struct {
  int32_t format, dtype;
  int32_t rows, columns, first, count;
  const void* matrix;
  const uint32_t* ids;  // [count], or null
  void* to;             // [count, columns]
} StillDequantize;
int still_dequantize(const StillDequantize* args, StillStream stream);

// Blocks of `from` [rows, columns], in STILL_Q8_0 or STILL_E4M3, into `to`.
int still_quantize(int32_t format, int32_t dtype, int32_t rows, int32_t columns, const void* from, void* to, StillStream stream);

#ifdef __cplusplus
}
#endif
