// Sixteen bytes of values at a time, as f32.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

namespace still {

template <class T>
struct Pack {
  static constexpr int COUNT = 16 / sizeof(T);
  float value[COUNT];
};

__device__ __forceinline__ Pack<float> load_pack(const float* from) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}

__device__ __forceinline__ Pack<__nv_bfloat16> load_pack(const __nv_bfloat16* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  Pack<__nv_bfloat16> pack;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // bf16 is the upper half of f32
    pack.value[2 * i] = __uint_as_float(word[i] << 16);
    pack.value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
  return pack;
}

__device__ __forceinline__ void store_pack(float* to, const Pack<float>& x) {
  *reinterpret_cast<float4*>(to) = make_float4(x.value[0], x.value[1], x.value[2], x.value[3]);
}

__device__ __forceinline__ void store_pack(__nv_bfloat16* to, const Pack<__nv_bfloat16>& x) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(x.value[2 * i], x.value[2 * i + 1]);
    word[i] = *reinterpret_cast<const uint32_t*>(&two);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
}

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_f32(float* to, float x) { *to = x; }
__device__ __forceinline__ void from_f32(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

// Values of equally long arrays one by one, by a grid of `each_grid` blocks: whole packs by `f(position)`, what is left by
// `g(position)`.
template <class T, class F, class G>
__device__ __forceinline__ void each(int64_t count, F f, G g) {
  constexpr int PACK = Pack<T>::COUNT;
  const int64_t whole = count / PACK, stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < whole; i += stride) f(i * PACK);
  for (int64_t i = whole * PACK + first; i < count; i += stride) g(i);
}
constexpr int EACH_THREADS = 256;
inline int each_grid(int64_t count, int pack) {
  const int64_t blocks = (count / pack + EACH_THREADS) / EACH_THREADS;
  return int(blocks < 8192 ? blocks : 8192);
}

// Sums of `N` values over a block, for every thread. `place` is shared memory of N * 32 floats; all threads call it.
template <int N>
__device__ __forceinline__ void block_sums(float (&x)[N], float* place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; n++)
    for (int step = 16; step > 0; step /= 2) x[n] += __shfl_xor_sync(~0u, x[n], step);
  __syncthreads();  // what was there before has been read
  if (lane == 0)
    for (int n = 0; n < N; n++) place[n * 32 + warp] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = lane < warps ? place[n * 32 + lane] : 0.f;
    for (int step = 16; step > 0; step /= 2) x[n] += __shfl_xor_sync(~0u, x[n], step);
  }
}

// Calls `f` with a value of the dtype's type.
template <class F>
int by_dtype(int32_t dtype, F f) {
  switch (dtype) {
    case STILL_F32: return f(float{});
    case STILL_BF16: return f(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace still
