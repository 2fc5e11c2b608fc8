// The root-mean-square norm and its gradient: a block a row, read twice, the second time from the caches.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

template <class T>
__global__ void rms_norm(int width, const T* x, const T* weight, float eps, T* y) {
  __shared__ float place[32];
  constexpr int PACK = Pack<T>::COUNT;
  const int64_t row = int64_t(blockIdx.x) * width;
  x += row, y += row;
  const int step = blockDim.x * PACK, first = threadIdx.x * PACK;
  float squares[1] = {0.f};
  for (int at = first; at < width; at += step) {
    const auto a = load_pack(x + at);
#pragma unroll
    for (int i = 0; i < PACK; i++) squares[0] += a.value[i] * a.value[i];
  }
  block_sums(squares, place);
  const float scale = rsqrtf(squares[0] / width + eps);
  for (int at = first; at < width; at += step) {
    auto a = load_pack(x + at);
    const auto w = load_pack(weight + at);
#pragma unroll
    for (int i = 0; i < PACK; i++) a.value[i] *= scale * w.value[i];
    store_pack(y + at, a);
  }
}

template <class T>
__global__ void rms_norm_backward(int width, const T* x, const T* weight, float eps, const T* d_y, const T* add, T* d_x) {
  __shared__ float place[2 * 32];
  constexpr int PACK = Pack<T>::COUNT;
  const int64_t row = int64_t(blockIdx.x) * width;
  x += row, d_y += row, d_x += row;
  const int step = blockDim.x * PACK, first = threadIdx.x * PACK;
  float sums[2] = {0.f, 0.f};  // of x^2, and of x * weight * d_y
  for (int at = first; at < width; at += step) {
    const auto a = load_pack(x + at), w = load_pack(weight + at), d = load_pack(d_y + at);
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      sums[0] += a.value[i] * a.value[i];
      sums[1] += a.value[i] * w.value[i] * d.value[i];
    }
  }
  block_sums(sums, place);
  const float scale = rsqrtf(sums[0] / width + eps), along = sums[1] * scale * scale / width;
  for (int at = first; at < width; at += step) {  // from the caches
    const auto a = load_pack(x + at), w = load_pack(weight + at), d = load_pack(d_y + at);
    Pack<T> y = {};
    if (add) y = load_pack(add + row + at);
#pragma unroll
    for (int i = 0; i < PACK; i++) y.value[i] += scale * (w.value[i] * d.value[i] - a.value[i] * along);
    store_pack(d_x + at, y);
  }
}

}  // namespace still

using namespace still;

// Threads of a block that has a row of so many packs.
static int row_threads(int packs) { return packs >= 512 ? 512 : (packs + 31) / 32 * 32; }

int still_rms_norm(int32_t dtype, int64_t rows, int32_t width, const void* x, const void* weight, float eps, void* y, StillStream stream) {
  return by_dtype(dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (width <= 0 || width % Pack<T>::COUNT) return cudaErrorInvalidValue;
    return launch(rms_norm<T>, dim3(unsigned(rows)), row_threads(width / Pack<T>::COUNT), 0, stream, int(width), static_cast<const T*>(x),
                  static_cast<const T*>(weight), eps, static_cast<T*>(y));
  });
}

int still_rms_norm_backward(int32_t dtype, int64_t rows, int32_t width, const void* x, const void* weight, float eps,
                            const void* d_y, const void* add, void* d_x, StillStream stream) {
  return by_dtype(dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (width <= 0 || width % Pack<T>::COUNT) return cudaErrorInvalidValue;
    return launch(rms_norm_backward<T>, dim3(unsigned(rows)), row_threads(width / Pack<T>::COUNT), 0, stream, int(width), static_cast<const T*>(x),
                  static_cast<const T*>(weight), eps, static_cast<const T*>(d_y), static_cast<const T*>(add),
                  static_cast<T*>(d_x));
  });
}
