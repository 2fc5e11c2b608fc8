// The maps' matrices as the kernels multiply by them: rounded to their dtype, reflections folded in, as a reflection keeps the norm:
//   W' = (I - 2 u u^T / |u|^2) W
#include "launch.cuh"
#include "values.cuh"

namespace still {

constexpr int FOLDED_COLUMNS = 32, FOLDING_WARPS = 8;

struct Fold {
  const float *w_q, *w_k, *u_q, *u_k;
  void *folded_q, *folded_k;
  int heads;
};

// A block has some columns of a head's matrix. Each warp has every eighth row of them.
template <class K>
__global__ void __launch_bounds__(FOLDED_COLUMNS* FOLDING_WARPS) fold(const Fold in) {
  using T = typename K::T;
  constexpr int D = K::D, ROWS = D / FOLDING_WARPS;
  static_assert(D % FOLDING_WARPS == 0, "warps have equally many rows");
  __shared__ float dots[FOLDING_WARPS][FOLDED_COLUMNS], squares[FOLDING_WARPS];
  const bool of_queries = blockIdx.x < in.heads;
  const int head = of_queries ? blockIdx.x : blockIdx.x - in.heads;
  const int lane = threadIdx.x % FOLDED_COLUMNS, warp = threadIdx.x / FOLDED_COLUMNS, column = blockIdx.y * FOLDED_COLUMNS + lane;
  const int64_t matrix = int64_t(head) * D * D;
  const float *w = (of_queries ? in.w_q : in.w_k) + matrix, *u = of_queries ? in.u_q : in.u_k;
  T* to = static_cast<T*>(of_queries ? in.folded_q : in.folded_k) + matrix;
  const bool on = column < D;

  float value[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) value[i] = on ? w[(warp + i * FOLDING_WARPS) * D + column] : 0.f;
  if (u) {
    u += head * D;
    float dot = 0.f, square = 0.f;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      const float x = u[warp + i * FOLDING_WARPS];
      dot += x * value[i];
      square += x * x;
    }
    dots[warp][lane] = dot;
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    dot = square = 0.f;
    for (int i = 0; i < FOLDING_WARPS; i++) {
      dot += dots[i][lane];
      square += squares[i];
    }
    const float twice = 2.f * dot / fmaxf(square, 1e-24f);
#pragma unroll
    for (int i = 0; i < ROWS; i++) value[i] -= twice * u[warp + i * FOLDING_WARPS];
  }
  if (!on) return;
#pragma unroll
  for (int i = 0; i < ROWS; i++) from_f32(to + (warp + i * FOLDING_WARPS) * D + column, value[i]);
}

}  // namespace still

extern "C" int still_fold(const StillShape* shape, const float* w_q, const float* w_k, const float* u_q, const float* u_k, void* folded_q,
                          void* folded_k, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    const dim3 grid(shape->heads + shape->kv_heads, (K::D + still::FOLDED_COLUMNS - 1) / still::FOLDED_COLUMNS);
    const still::Fold in{w_q, w_k, u_q, u_k, folded_q, folded_k, shape->heads};
    return still::launch(still::fold<K>, grid, still::FOLDED_COLUMNS * still::FOLDING_WARPS, 0, stream, in);
  });
}
