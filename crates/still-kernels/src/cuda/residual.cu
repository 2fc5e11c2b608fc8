// The sum of a block's input and its output: each value is read once and written once.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

template <class T>
__global__ void residual(int64_t count, const T* x, const T* y, T* sum) {
  each<T>(
      count,
      [&](int64_t at) {
        auto a = load_pack(x + at);
        const auto b = load_pack(y + at);
#pragma unroll
        for (int i = 0; i < Pack<T>::COUNT; i++) a.value[i] += b.value[i];
        store_pack(sum + at, a);
      },
      [&](int64_t at) { from_f32(sum + at, to_f32(x[at]) + to_f32(y[at])); });
}

}  // namespace still

using namespace still;

int still_residual(int32_t dtype, int64_t count, const void* x, const void* y, void* sum, StillStream stream) {
  return by_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    return launch(residual<T>, each_grid(count, Pack<T>::COUNT), EACH_THREADS, 0, stream, count, static_cast<const T*>(x),
                  static_cast<const T*>(y), static_cast<T*>(sum));
  });
}
