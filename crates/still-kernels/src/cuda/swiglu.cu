// The gated activation of the MLP and its gradient: each value is read once and written once.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

constexpr int SWIGLU_THREADS = 256;

struct Gated {
  float silu, slope;
};

__device__ __forceinline__ Gated gated(float x) {
  const float sigmoid = 1.f / (1.f + __expf(-x)), silu = x * sigmoid;
  return {silu, sigmoid + silu * (1.f - sigmoid)};
}

// Whole packs by `f(position)`, what is left by `g(position)`.
template <class T, class F, class G>
__device__ __forceinline__ void each(int64_t count, F f, G g) {
  constexpr int PACK = Pack<T>::COUNT;
  const int64_t whole = count / PACK, stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < whole; i += stride) f(i * PACK);
  for (int64_t i = whole * PACK + first; i < count; i += stride) g(i);
}

template <class T>
__global__ void swiglu(int64_t count, const T* gate, const T* up, T* hidden) {
  each<T>(
      count,
      [&](int64_t at) {
        const auto a = load_pack(gate + at), b = load_pack(up + at);
        Pack<T> y;
#pragma unroll
        for (int i = 0; i < Pack<T>::COUNT; i++) y.value[i] = gated(a.value[i]).silu * b.value[i];
        store_pack(hidden + at, y);
      },
      [&](int64_t at) { from_f32(hidden + at, gated(to_f32(gate[at])).silu * to_f32(up[at])); });
}

template <class T>
__global__ void swiglu_backward(int64_t count, const T* gate, const T* up, const T* d_hidden, T* d_gate, T* d_up) {
  each<T>(
      count,
      [&](int64_t at) {
        const auto a = load_pack(gate + at), b = load_pack(up + at), d = load_pack(d_hidden + at);
        Pack<T> of_gate, of_up;
#pragma unroll
        for (int i = 0; i < Pack<T>::COUNT; i++) {
          const Gated g = gated(a.value[i]);
          of_gate.value[i] = d.value[i] * b.value[i] * g.slope;
          of_up.value[i] = d.value[i] * g.silu;
        }
        store_pack(d_gate + at, of_gate);
        store_pack(d_up + at, of_up);
      },
      [&](int64_t at) {
        const Gated g = gated(to_f32(gate[at]));
        const float d = to_f32(d_hidden[at]);
        from_f32(d_gate + at, d * to_f32(up[at]) * g.slope);
        from_f32(d_up + at, d * g.silu);
      });
}

int swiglu_grid(int64_t count, int pack) {
  const int64_t blocks = (count / pack + SWIGLU_THREADS) / SWIGLU_THREADS;
  return int(blocks < 8192 ? blocks : 8192);
}

}  // namespace still

using namespace still;

int still_swiglu(int32_t dtype, int64_t count, const void* gate, const void* up, void* hidden, StillStream stream) {
  return by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(swiglu<T>, swiglu_grid(count, Pack<T>::COUNT), SWIGLU_THREADS, 0, stream, count, static_cast<const T*>(gate),
                  static_cast<const T*>(up), static_cast<T*>(hidden));
  });
}

int still_swiglu_backward(int32_t dtype, int64_t count, const void* gate, const void* up, const void* d_hidden, void* d_gate,
                          void* d_up, StillStream stream) {
  return by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(swiglu_backward<T>, swiglu_grid(count, Pack<T>::COUNT), SWIGLU_THREADS, 0, stream, count,
                  static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(d_hidden),
                  static_cast<T*>(d_gate), static_cast<T*>(d_up));
  });
}
