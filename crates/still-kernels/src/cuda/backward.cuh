// What the kernels of the backward pass share.
//
// With p = e^{s - m} / den and delta = d_out . out, an exact key's logit gets ds = p (d_out . v - delta), and the arg-max key
// the negative sum of all ds beside. That sum needs no pass over the keys: it is -phi . dphi of the query's own feature map,
// which is also the gradient of ln lambda. The linear kernel therefore runs first and leaves it as `inner`.
#pragma once
#include "launch.cuh"

namespace still {

// Work of the salient keys' gradients: tiles of 64 entries of a KV head's list, each by `parts` blocks that take a share of the
// queries and leave partial sums.
struct SalientWork {
  int tiles, parts;
  __host__ __device__ SalientWork(int budget, int retired)
      : tiles((budget * retired + CHUNK - 1) / CHUNK), parts(tiles >= 64 ? 1 : tiles >= 32 ? 2 : tiles >= 16 ? 4 : 8) {}
  __host__ __device__ int units() const { return tiles * parts; }
};

template <class T>
struct Backward {
  Rows<const T> q, k, v, out, d_out, linear, d_linear;
  Rows<T> d_q, d_k, d_v, d_gate;
  const T *w_q, *w_k, *phi_k, *s;
  const float *log_scale, *z, *denominator, *maximum;
  const int32_t* arg_max;
  StillRouting routing;
  float *d_w_q, *d_w_k, *d_log_scale;
  // Scratch, in this order.
  float *minus_delta, *inner;  // [B, H, N]
  T* phi_q;                    // [B, H, N, 2D]: lambda / den phi
  T* df_q;                     // [B, H, N, D]
  T* df_k;                     // [B, K, N, D], in the rows of `phi_k`
  float* totals;               // of the scan
  T* d_s;                      // [B, K, R, 2D, D]
  float* d_z;                  // [B, K, R, 2D]
  float* partial;              // [B, units, 2, 64, D]
  float* d_w_parts;            // [parts, heads, D, D]
  int64_t bytes;
  int tokens, heads, kv_heads, group, chunks, units, segments, flags;

  Backward(const StillShape& shape, const StillBackward& a, const int32_t* host_budgets);
};

}  // namespace still
