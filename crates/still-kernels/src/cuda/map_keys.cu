// phi(k) of the tokens that enter the linear state. One block a chunk, a warp 16 tokens.
#include "launch.cuh"
#include "np_map.cuh"

namespace still {

template <class K>
__global__ void __launch_bounds__(128) map_keys(Rows<const typename K::T> k, const typename K::T* w, const uint64_t* selected,
                                                typename K::T* phi, int tokens) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  extern __shared__ __align__(1024) unsigned char memory[];
  Tile<P, CHUNK, D> keys{shared_address(memory)};
  Tile<P, D, D> weights{keys.base + keys.BYTES};
  const int chunk = blockIdx.x, head = blockIdx.y, b = blockIdx.z, start = chunk * CHUNK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bh = int64_t(b) * gridDim.y + head;
  load_rows<128>(keys, 0, CHUNK, k.data, [&](int i) { return start + i < tokens ? k.row(b, head, start + i) : nullptr; });
  load_rows<128>(weights, 0, D, w, [&](int i) { return w + (int64_t(head) * D + i) * D; });
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  Left<P> x[KS];
#pragma unroll
  for (int i = 0; i < KS; i++) load_left(x[i], keys, warp * 16, i * 16);
  float squared[2];
  squared_norms(x, squared);
  float plus[NT][4], minus[NT][4];
  clear(plus);
  product_nn<KS, NT>(plus, x, weights, 0);
  np_map(plus, minus, squared);
  const uint64_t kept = selected[bh * gridDim.x + chunk];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int i = warp * 16 + half * 8 + lane / 4;
    if (start + i >= tokens) continue;
    const float on = kept >> i & 1 ? 0.f : 1.f;
    T* to = phi + (bh * tokens + start + i) * 2 * D + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      store_pair(to + n * 8, plus[n][half * 2] * on, plus[n][half * 2 + 1] * on);
      store_pair(to + D + n * 8, minus[n][half * 2] * on, minus[n][half * 2 + 1] * on);
    }
  }
}

}  // namespace still

extern "C" int still_map_keys(const StillShape* shape, StillRows k, const void* w, const uint64_t* selected, void* phi,
                              StillStream stream) {
  return still::dispatch(*shape, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    constexpr int bytes = still::Tile<K::P, still::CHUNK, K::D>::BYTES + still::Tile<K::P, K::D, K::D>::BYTES;
    return still::launch(still::map_keys<K>, dim3(still::chunks(*shape), shape->kv_heads, shape->batch), 128, bytes, stream,
                         still::Rows<const T>(k), static_cast<const T*>(w), selected, static_cast<T*>(phi), shape->tokens);
  });
}
