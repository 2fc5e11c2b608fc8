// From a shape that is known when the program runs to kernels that are compiled for it: the one dispatch point.
#pragma once
#include <cuda_runtime.h>
#include <mutex>
#include "still.h"
#include "tile.cuh"

namespace still {

template <class T>
struct Rows {
  T* data;
  int64_t batch, head, token;
  Rows() = default;
  __host__ __device__ Rows(StillRows r) : data(static_cast<T*>(r.data)), batch(r.batch), head(r.head), token(r.token) {}
  __device__ __forceinline__ T* row(int b, int h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

inline int chunks(const StillShape& s) { return (s.tokens + CHUNK - 1) / CHUNK; }
inline int retired(const StillShape& s) { return chunks(s) > 2 ? chunks(s) - 2 : 0; }

// Segments of the state scan: a GPU's worth of blocks, segments of three chunks or more. Chunks of a segment come one after the
// other, which is what a scan of few waits for.
inline int segments(const StillShape& s) {
  const int blocks = s.batch * s.kv_heads * s.head_dim / 32, wave = 384 / blocks, most = retired(s) / 3;
  const int wanted = wave > 1 ? wave : 1;
  return most < 1 ? 1 : most < wanted ? most : wanted;
}

// Salient tokens of a head after so many retirements.
__host__ __device__ inline int kept_tokens(int cap, int budget, int retired) {
  const int all = budget * retired;
  return all < cap ? all : cap;
}

// The linear branch's scale of a head that has absorbed `count` tokens.
__device__ __forceinline__ float linear_scale(const float* log_scale, int flags, int head, int count) {
  if (flags & STILL_NO_LINEAR) return 0.f;
  if (!log_scale) return 1.f;
  const float scale = expf(log_scale[head]);
  return flags & STILL_SUM ? scale : scale / count;
}

// Chunks of the window that a query of a chunk sees.
__device__ __forceinline__ int window_chunks(int flags, int chunk) { return flags & STILL_NO_WINDOW || chunk == 0 ? 1 : 2; }

// Whether a query of a chunk sees a key of it, by their places.
__device__ __forceinline__ bool sees_in_chunk(int flags, int query, int key) {
  return flags & STILL_NO_WINDOW ? key == query : key <= query;
}

// Whether a query sees no key exactly but its own: then its weight does not depend on its logit, and what the logit's gradient adds
// up to is rounding.
__device__ __forceinline__ bool sees_itself_alone(int flags, int kept) {
  return flags & STILL_NO_WINDOW && (flags & STILL_NO_SALIENT || kept == 0);
}

// Whether nothing of a head is ever absorbed.
__host__ __device__ inline bool keeps_all(int cap, int budget) { return cap == STILL_NO_CAP && budget >= CHUNK; }

// No token, where negative numbers are rows of a state's store.
constexpr int NO_TOKEN = INT32_MIN;

// Chunks of a sequence that had retired before its first token.
__device__ __forceinline__ int retired_before(const StillRouting& r, int b) { return r.retired ? r.retired[b] : 0; }

// The salient tokens that a chunk's queries see, `kept_tokens` of them. `row`: (sequence, KV head).
__device__ __forceinline__ const int32_t* visible_list(const StillRouting& r, int64_t row, int chunk, int chunks, int tokens) {
  return r.cap == STILL_NO_CAP ? r.salient + row * (tokens + r.stored) : r.visible + (row * chunks + chunk) * r.cap;
}

// The row of k and v that a token has which a chunk finds at its retirement: the chunk's own, or one that was kept before.
__device__ __forceinline__ int row_at_retirement(const StillRouting& r, int token, int chunk) {
  return token < chunk * CHUNK ? token + r.rounded : token;
}

// The first chunk that sees a state: its prefix states begin with that one's.
__host__ __device__ inline int first_state_chunk(const StillRouting& r) { return r.retired ? 1 : 2; }

// Whether an entry of `order` enters the state.
__device__ __forceinline__ bool enters(const StillRouting& r, int entry) { return entry >= 0 || (r.retired && entry != NO_TOKEN); }

inline bool valid(const StillShape& s) {
  return s.batch > 0 && s.kv_heads > 0 && s.heads > 0 && s.heads % s.kv_heads == 0 && s.tokens > 0 &&
         (s.dtype == STILL_F32 || s.dtype == STILL_BF16);
}

template <class T_, int D_>
struct Kind {
  using T = T_;
  static constexpr int D = D_, P = planes<T_>;
};

// Calls `f(Kind<T, D>{})`, D of `DIMS`; an error if the shape has no kernel.
template <int... DIMS, class F>
int dispatch_dims(const StillShape& s, F f) {
  if (!valid(s)) return cudaErrorInvalidValue;
  auto by_dim = [&](auto t) {
    int result = cudaErrorInvalidValue;
    ((s.head_dim == DIMS && (result = f(Kind<decltype(t), DIMS>{}), true)) || ...);
    return result;
  };
#ifdef STILL_QUICK  // one kind, to look at its machine code: -DSTILL_QUICK=128 -DSTILL_QUICK_TYPE=__nv_bfloat16
  if (s.head_dim != STILL_QUICK || planes<STILL_QUICK_TYPE> != (s.dtype == STILL_BF16 ? 1 : 2)) return cudaErrorInvalidValue;
  return f(Kind<STILL_QUICK_TYPE, STILL_QUICK>{});
#else
  return s.dtype == STILL_BF16 ? by_dim(__nv_bfloat16{}) : by_dim(float{});
#endif
}

// The head dimensions of hybrid attention.
template <class F>
int dispatch(const StillShape& s, F f) {
  return dispatch_dims<64, 80, 96, 128>(s, f);
}

// Those of its forward pass and of its state: shared memory has room for tiles of 256 channels in bf16.
template <class F>
int dispatch_forward(const StillShape& s, F f) {
  return dispatch_dims<64, 80, 96, 128, 256>(s, [&](auto kind) -> int {
    using K = decltype(kind);
    if constexpr (K::P == 2 && K::D > 128) return cudaErrorInvalidValue;
    else return f(kind);
  });
}

inline int count_multiprocessors(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// Launches with `bytes` of dynamic shared memory. `early`: the kernel may begin before the one before it has ended.
template <class... P, class... A>
int launch_as(bool early, void (*kernel)(P...), dim3 grid, int threads, int bytes, StillStream stream, A... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  // What a kernel may ask for is its own, not the launch's: another thread must not lower it in between.
  static std::mutex asking;
  std::lock_guard<std::mutex> lock(asking);
  if (bytes > 16 * 1024) {  // more than 48 KiB together with what the kernel declares itself has to be asked for
    cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess) return e;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, int bytes, StillStream stream, A... args) {
  return launch_as(false, kernel, grid, threads, bytes, stream, args...);
}

// Of a kernel that waits for the one before it (`wait_for_previous`) before it reads what a kernel writes, and before it writes. In
// a captured step it begins early: weights, tables and stores are then as they were before the graph was launched. Elsewhere the
// kernel before may be the one that makes them.
template <class... P, class... A>
int launch_early(void (*kernel)(P...), dim3 grid, int threads, int bytes, StillStream stream, A... args) {
  cudaStreamCaptureStatus status;
  if (cudaError_t e = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status); e != cudaSuccess) return e;
  bool early = status == cudaStreamCaptureStatusActive;
  if (early) {  // code for older GPUs, which runs on newer ones too, does not wait
    cudaFuncAttributes code;
    if (cudaError_t e = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)); e != cudaSuccess) return e;
    early = code.ptxVersion >= 90;
    // Blocks of two kernels share a multiprocessor only if they divide its memory alike.
    const cudaError_t e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                                               cudaSharedmemCarveoutMaxShared);
    if (e != cudaSuccess) return e;
  }
  return launch_as(early, kernel, grid, threads, bytes, stream, args...);
}

}  // namespace still
