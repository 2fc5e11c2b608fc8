// Self-Saliency Scores: one block a (sequence, KV head, chunk), a warp 16 queries, one query head after the other.
// A score takes two sums over the window and the diagonal logit.
#include "fragments.cuh"
#include "launch.cuh"
#include "self_saliency.cuh"

namespace still {

template <class K>
__global__ void __launch_bounds__(128) saliency(Rows<const typename K::T> q, Rows<const typename K::T> k, float* score,
                                                int tokens, int kv_heads, int group) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ float sums[CHUNK];
  Tile<P, 128, D> keys{shared_address(memory)};
  const int chunk = blockIdx.x, head = blockIdx.y, b = blockIdx.z, start = chunk * CHUNK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  auto load_queries = [&](int g) {
    Tile<P, CHUNK, D> tile{keys.base + keys.BYTES + g % 2 * Tile<P, CHUNK, D>::BYTES};
    load_matrix<128, CHUNK>(tile, 0, q.row(b, head * group + g, start), q.token, tokens - start);
    copy_commit();
  };
  // Keys of the chunk before and of this one.
  load_matrix<128, CHUNK>(keys, 0, k.row(b, head, max(start - CHUNK, 0)), k.token, chunk > 0 ? CHUNK : 0);
  load_matrix<128, CHUNK>(keys, CHUNK, k.row(b, head, start), k.token, tokens - start);
  load_queries(0);

  float total[2] = {0.f, 0.f};
  const float scale = rsqrtf(float(D)) * LOG2E;
  for (int g = 0; g < group; g++) {
    if (g + 1 < group) load_queries(g + 1); else copy_commit();
    copy_wait<1>();
    __syncthreads();
    Tile<P, CHUNK, D> queries{keys.base + keys.BYTES + g % 2 * Tile<P, CHUNK, D>::BYTES};
    Left<P> a[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(a[i], queries, warp * 16, i * 16);
    // Of the 128 keys a warp's windows reach over 79 from the one at 16 warp + 1.
    float s[10][4];
    clear(s);
    product_nt<KS, 10>(s, a, keys, warp * 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane / 4 + half * 8;  // window: columns row + 1 ..= row + 64 of these 80
      const int before = chunk == 0 ? CHUNK - warp * 16 : 0;
      float m = -INFINITY;
#pragma unroll
      for (int n = 0; n < 10; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int c = n * 8 + lane % 4 * 2 + i;
          float& x = s[n][half * 2 + i];
          x = c > row && c <= row + CHUNK && c >= before ? x * scale : -INFINITY;
          m = fmaxf(m, x);
        }
      m = row_max(m);
      float rest = 0.f, self = 0.f;
#pragma unroll
      for (int n = 0; n < 10; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          int c = n * 8 + lane % 4 * 2 + i;
          float e = exp2f(s[n][half * 2 + i] - m);
          if (c == row + CHUNK) self += e; else rest += e;
        }
      total[half] += self_saliency(row_sum(rest), row_sum(self));
    }
    __syncthreads();
  }
  if (lane % 4 == 0) {
    sums[warp * 16 + lane / 4] = total[0];
    sums[warp * 16 + lane / 4 + 8] = total[1];
  }
  __syncthreads();
  int t = start + threadIdx.x;
  if (threadIdx.x < CHUNK && t < tokens) score[(int64_t(b) * kv_heads + head) * tokens + t] = sums[threadIdx.x] / group;
}

}  // namespace still

extern "C" int still_saliency(const StillShape* shape, StillRows q, StillRows k, float* score, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    using T = const typename K::T;
    constexpr int bytes = still::Tile<K::P, 128, K::D>::BYTES * 2;
    return still::launch(still::saliency<K>, dim3(still::chunks(*shape), shape->kv_heads, shape->batch), 128, bytes, stream,
                         still::Rows<T>(q), still::Rows<T>(k), score, shape->tokens, shape->kv_heads,
                         shape->heads / shape->kv_heads);
  });
}
