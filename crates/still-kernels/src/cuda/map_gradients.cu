// dW = sum_t x_t' df_t of every map, and the gradients of ln lambda. Blocks take a share of the chunks each; the shares are
// added in order.
#include "backward_steps.cuh"
#include "wgmma.cuh"

namespace still {

template <class T>
struct MapGradient {
  Rows<const T> x;
  const T* df;             // [B, heads, N, D]
  float* parts;            // [gridDim.y, heads, D, D]
  StillRouting routing;
  const int32_t* order;    // which rows of x the rows of `df` belong to; null: the same
  int tokens, heads, group, first, chunks, batch;  // chunks first..first + chunks of every sequence
};

template <class K>
__global__ void __launch_bounds__(K::D * 2) map_gradient(const MapGradient<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, NT = D / 8, THREADS = D * 2;
  using Stage = Tile<P, 128, D>;  // x, df
  extern __shared__ unsigned char memory[];
  const uint32_t base = aligned(memory);
  auto stage = [&](int i) { return Stage{base + i % 2 * Stage::BYTES}; };
  const int head = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int all = in.chunks * in.batch, begin = int64_t(all) * blockIdx.y / gridDim.y;
  int end = int64_t(all) * (blockIdx.y + 1) / gridDim.y;
  if (keeps_all(in.routing.cap, in.routing.budgets[head / in.group])) end = begin;  // nothing is absorbed
  auto load = [&](int i) {
    if (i < end) {
      const int b = i / in.chunks, start = (in.first + i % in.chunks) * CHUNK;
      const T* df = in.df + ((int64_t(b) * in.heads + head) * in.tokens + start) * D;
      if (in.order) {
        const int32_t* order = in.order + ((int64_t(b) * in.heads + head) * in.chunks + i % in.chunks) * CHUNK;
        load_rows<THREADS>(stage(i - begin), 0, CHUNK, in.x.data, [&](int r) { const int t = order[r]; return t < 0 ? nullptr : in.x.row(b, head, t); });
      } else {
        load_matrix<THREADS, CHUNK>(stage(i - begin), 0, in.x.row(b, head, start), in.x.token, in.tokens - start);
      }
      load_matrix<THREADS, CHUNK>(stage(i - begin), CHUNK, df, D, in.tokens - start);
    }
    copy_commit();
  };
  float sums[NT][4];
  clear(sums);
  load(begin);
  for (int i = begin; i < end; i++) {
    copy_wait<0>();
    publish();
    __syncthreads();
    load(i + 1);
    const Stage tile = stage(i - begin);
    Left<P> a[4];
#pragma unroll
    for (int k = 0; k < 4; k++) load_left_transposed(a[k], tile, k * 16, warp * 16);
    add_product<4, NT>(sums, a, tile, CHUNK);
  }
  float* to = in.parts + ((int64_t(blockIdx.y) * in.heads + head) * D + warp * 16 + lane / 4) * D + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    store_pair(to + n * 8, sums[n][0], sums[n][1]);
    store_pair(to + 8 * D + n * 8, sums[n][2], sums[n][3]);
  }
}

__global__ void __launch_bounds__(256) add_parts(const float* parts, float* to, int64_t size, int count) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int p = 0; p < count; p++) sum += parts[p * size + i];
  to[i] = sum;
}

// d ln lambda of a head: the sum of `inner` over its rows.
__global__ void __launch_bounds__(256) scale_gradient(const float* inner, float* to, int heads, int tokens, int batch) {
  __shared__ float sums[256];
  float sum = 0.f;
  for (int b = 0; b < batch; b++)
    for (int t = threadIdx.x; t < tokens; t += 256) sum += inner[(int64_t(b) * heads + blockIdx.x) * tokens + t];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int width = 128; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) to[blockIdx.x] = sums[0];
}

int step_maps(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) -> int {
    using K = decltype(kind);
    using T = typename K::T;
    Backward<T> in(shape, args, args.host_budgets);
    constexpr int bytes = 2 * Tile<K::P, 128, K::D>::BYTES + ALIGNMENT;
    const int slots = retired(shape);
    auto gradient = [&](Rows<const T> x, const T* df, float* to, int heads, int first, const int32_t* order) -> int {
      const int parts = map_parts(shape, heads);
      MapGradient<T> job{x, df, in.d_w_parts, in.routing, order, shape.tokens, heads, heads / shape.kv_heads, first, slots, shape.batch};
      int error = launch(map_gradient<K>, dim3(heads, parts), K::D * 2, bytes, stream, job);
      const int64_t size = int64_t(heads) * K::D * K::D;
      return error ? error : launch(add_parts, dim3((size + 255) / 256), 256, 0, stream, static_cast<const float*>(in.d_w_parts), to, size, parts);
    };
    int error = gradient(in.q, in.df_q, in.d_w_q, shape.heads, 2, nullptr);
    if (!error) error = gradient(in.k, in.df_k, in.d_w_k, shape.kv_heads, 0, in.routing.order);
    if (!error && in.d_log_scale)
      error = launch(scale_gradient, dim3(shape.heads), 256, 0, stream, static_cast<const float*>(in.inner), in.d_log_scale, shape.heads, shape.tokens, shape.batch);
    return error;
  });
}

}  // namespace still
