// The gated activation of the MLP and its gradient: each value is read once and written once.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

struct Gated {
  float silu, slope;
};

__device__ __forceinline__ Gated gated(float x) {
  const float sigmoid = 1.f / (1.f + __expf(-x)), silu = x * sigmoid;
  return {silu, sigmoid + silu * (1.f - sigmoid)};
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

}  // namespace still

using namespace still;

int still_swiglu(int32_t dtype, int64_t count, const void* gate, const void* up, void* hidden, StillStream stream) {
  return by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(swiglu<T>, each_grid(count, Pack<T>::COUNT), EACH_THREADS, 0, stream, count, static_cast<const T*>(gate),
                  static_cast<const T*>(up), static_cast<T*>(hidden));
  });
}

int still_swiglu_backward(int32_t dtype, int64_t count, const void* gate, const void* up, const void* d_hidden, void* d_gate,
                          void* d_up, StillStream stream) {
  return by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(swiglu_backward<T>, each_grid(count, Pack<T>::COUNT), EACH_THREADS, 0, stream, count,
                  static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const T*>(d_hidden),
                  static_cast<T*>(d_gate), static_cast<T*>(d_up));
  });
}
