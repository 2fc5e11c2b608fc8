// phi(k) of the tokens that enter the linear state. A block maps up to four chunks of one head, a warp 16 tokens of each; fewer
// where there would be fewer blocks than the GPU runs at once.
#include "launch.cuh"
#include "np_map.cuh"
#include "wgmma.cuh"

namespace still {

constexpr int MOST_CHUNKS = 4, BLOCKS_AT_ONCE = 264;

template <class K, bool CAPPED>
__global__ void __launch_bounds__(128, K::P == 1 && K::D <= 128 ? 3 : 1) map_keys(Rows<const typename K::T> k, const typename K::T* w,
                                                                   const StillRouting routing, typename K::T* phi,
                                                                   int tokens, int chunks, int chunks_a_block, int flags) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using Keys = Tile<P, CHUNK, D>;
  extern __shared__ unsigned char memory[];
  const Tile<P, D, D> weights{aligned(memory)};
  auto keys = [&](int i) { return Keys{weights.base + weights.BYTES + i % 2 * Keys::BYTES}; };
  const int first = blockIdx.x * chunks_a_block, last = min(first + chunks_a_block, chunks), head = blockIdx.y, b = blockIdx.z;
  if (keeps_all(routing.cap, routing.budgets[head])) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bh = int64_t(b) * gridDim.y + head;
  auto entry = [&](int chunk, int i) { return routing.order[(bh * chunks + chunk) * CHUNK + i]; };
  auto load = [&](int chunk) {
    if (CAPPED && chunk < last)
      load_rows<128>(keys(chunk), 0, CHUNK, k.data, [&](int i) { const int t = entry(chunk, i); return k.row(b, head, enters(routing, t) ? row_at_retirement(routing, t, chunk) : 0); });
    else if (chunk < last)
      load_matrix<128, CHUNK>(keys(chunk), 0, k.row(b, head, chunk * CHUNK), k.token, tokens - chunk * CHUNK);
    copy_commit();
  };
  load_matrix<128, D>(weights, 0, w + int64_t(head) * D * D, D);
  load(first);
  for (int chunk = first; chunk < last; chunk++) {
    copy_wait<0>();
    publish();
    __syncthreads();
    load(chunk + 1);
    Left<P> x[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(x[i], keys(chunk), warp * 16, i * 16);
    float squared[2], plus[NT][4], minus[NT][4];
    squared_norms(x, squared);
    clear(plus);
    add_product<KS>(plus, x, weights, 0);
    np_map(plus, minus, squared, flags);
    const uint64_t kept = CAPPED ? 0 : routing.selected[bh * chunks + chunk];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = warp * 16 + half * 8 + lane / 4, t = chunk * CHUNK + i;
      const float factor = (CAPPED ? !enters(routing, entry(chunk, i)) : kept >> i & 1) ? 0.f : 1.f;
      T* to = phi + (bh * tokens + t) * 2 * D;
      store_row(t < tokens, to, plus, half, factor);
      store_row(t < tokens, to + D, minus, half, factor);
    }
  }
}

}  // namespace still

extern "C" int still_map_keys(const StillShape* shape, StillRows k, const void* w, const StillRouting* routing, void* phi,
                              StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    constexpr int bytes = 2 * still::Tile<K::P, still::CHUNK, K::D>::BYTES + still::Tile<K::P, K::D, K::D>::BYTES + still::ALIGNMENT;
    const bool capped = routing->cap != STILL_NO_CAP;
    const int chunks = capped ? still::retired(*shape) : still::chunks(*shape);
    const int all = chunks * shape->kv_heads * shape->batch / still::BLOCKS_AT_ONCE;
    const int chunks_a_block = all < 1 ? 1 : all < still::MOST_CHUNKS ? all : still::MOST_CHUNKS;
    const int blocks = (chunks + chunks_a_block - 1) / chunks_a_block;
    return still::launch(capped ? still::map_keys<K, true> : still::map_keys<K, false>, dim3(blocks, shape->kv_heads, shape->batch), 128,
                         bytes, stream, still::Rows<const T>(k), static_cast<const T*>(w), *routing, static_cast<T*>(phi), shape->tokens, chunks, chunks_a_block, int(shape->flags));
  });
}
