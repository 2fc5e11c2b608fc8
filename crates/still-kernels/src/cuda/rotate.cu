// Rotary position embedding of heads, from rows to rows.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

constexpr int ROTATE_THREADS = 256;

// A thread rotates one pack of a head's lower half with its counterpart in the upper half.
template <class T>
__global__ void rotate(StillRotation shape, Rows<T> from, Rows<T> to, const float* cos, const float* sin) {
  constexpr int PACK = Pack<T>::COUNT;
  const int half = shape.head_dim / 2, packs = half / PACK;
  const int64_t all = int64_t(shape.batch) * shape.tokens * shape.heads * packs;
  for (int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; n < all; n += int64_t(gridDim.x) * blockDim.x) {
    const int pack = int(n % packs), head = int(n / packs % shape.heads);
    const int64_t row = n / packs / shape.heads;  // of [batch, tokens]
    const int token = int(row % shape.tokens), sequence = int(row / shape.tokens);
    const int64_t angle = (int64_t(shape.runs == 1 ? 0 : sequence) * shape.tokens + token) * half + pack * PACK;
    const T* x = from.row(sequence, head, token) + pack * PACK;
    const auto low = load_pack(x), high = load_pack(x + half);
    Pack<T> y_low, y_high;
#pragma unroll
    for (int i = 0; i < PACK; i++) {
      const float c = cos[angle + i], s = shape.sign * sin[angle + i];
      y_low.value[i] = low.value[i] * c - high.value[i] * s;
      y_high.value[i] = high.value[i] * c + low.value[i] * s;
    }
    T* y = to.row(sequence, head, token) + pack * PACK;
    store_pack(y, y_low);
    store_pack(y + half, y_high);
  }
}

__global__ void rope_angles(int64_t count, int half, const uint32_t* positions, const double* frequencies, double scale, float* cosines,
                            float* sines) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    double s, c;
    sincos(double(positions[i / half]) * frequencies[i % half], &s, &c);
    cosines[i] = float(scale * c);
    sines[i] = float(scale * s);
  }
}

}  // namespace still

using namespace still;

int still_rope_angles(int64_t rows, int32_t half, const uint32_t* positions, const double* frequencies, double scale, float* cos, float* sin,
                      StillStream stream) {
  if (rows <= 0 || half <= 0) return cudaErrorInvalidValue;
  const int64_t count = rows * half, blocks = (count + ROTATE_THREADS - 1) / ROTATE_THREADS;
  return launch(rope_angles, dim3(unsigned(blocks < 16384 ? blocks : 16384)), ROTATE_THREADS, 0, stream, count, half, positions, frequencies,
                scale, cos, sin);
}

int still_rotate(const StillRotation* rotation, StillRows from, StillRows to, const float* cos, const float* sin,
                 StillStream stream) {
  return by_dtype(rotation->dtype, [&](auto t) -> int {
    using T = decltype(t);
    const int half = rotation->head_dim / 2, packs = half / Pack<T>::COUNT;
    if (half <= 0 || rotation->head_dim % 2 || half % Pack<T>::COUNT) return cudaErrorInvalidValue;
    const int64_t all = int64_t(rotation->batch) * rotation->tokens * rotation->heads * packs;
    const int64_t blocks = (all + ROTATE_THREADS - 1) / ROTATE_THREADS;
    return launch(rotate<T>, dim3(unsigned(blocks < 16384 ? blocks : 16384)), ROTATE_THREADS, 0, stream, *rotation,
                  Rows<T>(from), Rows<T>(to), cos, sin);
  });
}
