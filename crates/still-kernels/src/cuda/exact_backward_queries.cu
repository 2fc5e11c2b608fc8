// dq of the exact branch: as the forward pass, one product more a tile. The linear branch's share waits in d_q.
#include "backward_steps.cuh"
#include "key_stream.cuh"
#include "wgmma.cuh"

namespace still {

template <class K, int HEADS>
__global__ void __launch_bounds__(HEADS * 128, 1) exact_backward_queries(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, THREADS = HEADS * 128;
  using Queries = Tile<P, HEADS * CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 keys, 64 values
  extern __shared__ unsigned char memory[];
  const Queries queries{aligned(memory)}, d_outs{queries.base + Queries::BYTES};
  auto stage = [&](int i) { return Stage{d_outs.base + Queries::BYTES + i % 2 * Stage::BYTES}; };
  const int parts = in.group / HEADS, chunk = in.chunks - 1 - blockIdx.y, start = chunk * CHUNK;
  const int kv = blockIdx.x / parts, first_head = kv * in.group + blockIdx.x % parts * HEADS, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = first_head + warp / 4, first_row = warp % 4 * 16;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int retired = max(chunk - 1, 0), kept = kept_tokens(in.routing.cap, in.routing.budgets[kv], retired);
  const bool linear = retired * CHUNK > kept, alone = sees_itself_alone(in.flags, kept);
  const int window = window_chunks(in.flags, chunk), seen = in.flags & STILL_NO_SALIENT ? 0 : kept, stages = window + (seen + CHUNK - 1) / CHUNK;
  const int32_t* list = visible_list(in.routing, bk, chunk, in.chunks, in.tokens);

  KeyStream<T, D, THREADS> keys{in.k, in.v, list, b, kv, start, seen, in.tokens, window, stages};
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    load_matrix<THREADS, CHUNK>(queries, h * CHUNK, in.q.row(b, first_head + h, start), in.q.token, in.tokens - start);
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    load_matrix<THREADS, CHUNK>(d_outs, h * CHUNK, in.d_out.row(b, first_head + h, start), in.d_out.token, in.tokens - start);
  keys.look_up(0);
  keys.load(0, stage(0));

  float level[2], delta[2], inner[2];  // p = 2^(logit - level)
  int arg_max[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + first_row + lane / 4 + half * 8;
    const int64_t at = (int64_t(b) * in.heads + head) * in.tokens + t;
    const bool on = t < in.tokens;
    level[half] = on ? in.maximum[at] * LOG2E + log2f(in.denominator[at]) : INFINITY;
    delta[half] = on ? -in.minus_delta[at] : 0.f;
    inner[half] = on && !alone ? in.inner[at] : 0.f;
    arg_max[half] = on ? in.arg_max[at] : 0;
  }
  float d_q[NT][4];
  clear(d_q);
  const float natural = rsqrtf(float(D)), scale = natural * LOG2E;
  for (int i = 0; i < stages; i++) {
    copy_wait<0>();
    publish();
    __syncthreads();
    keys.load(i + 1, stage(i + 1));
    const Stage tile = stage(i);
    float s[8][4], d[8][4];
    start_tile_product<KS>(s, queries, warp / 4 * CHUNK, tile, 0);
    start_tile_product<KS>(d, d_outs, warp / 4 * CHUNK, tile, CHUNK);
    finish<P, D, 1>();
    hold_sums(s);
    const bool causal = i == window - 1, ragged = i >= window && (i - window + 1) * CHUNK > seen;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int column = n * 8 + lane % 4 * 2 + e % 2;
        s[n][e] = exp2_fast(s[n][e] * scale - level[e / 2]);
        if ((causal && !sees_in_chunk(in.flags, first_row + lane / 4 + e / 2 * 8, column)) || (ragged && (i - window) * CHUNK + column >= seen)) s[n][e] = 0.f;
      }
    finish<P, D>();
    hold_sums(d);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= alone ? 0.f : d[n][e] - delta[e / 2];
    Left<P> ds[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(ds[k], s[2 * k], s[2 * k + 1]);
    add_product<4, NT>(d_q, ds, tile, 0);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + first_row + lane / 4 + half * 8;
    T* to = in.d_q.row(b, head, t);
    if (linear && t < in.tokens) {
      const T *share = to + lane % 4 * 2, *key = in.k.row(b, kv, arg_max[half]) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 x = read_pair(share + n * 8), k = read_pair(key + n * 8);
        d_q[n][half * 2] += inner[half] * k.x + x.x / natural;
        d_q[n][half * 2 + 1] += inner[half] * k.y + x.y / natural;
      }
    }
    __syncwarp();
    store_row(t < in.tokens, to, d_q, half, natural);
  }
}

int step_queries(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    auto run = [&](auto kernel, auto heads) {
      constexpr int HEADS = decltype(heads)::value;
      constexpr int bytes = 2 * Tile<K::P, HEADS * 64, K::D>::BYTES + 2 * Tile<K::P, 128, K::D>::BYTES + ALIGNMENT;
      return launch(kernel, dim3(shape.heads / HEADS, in.chunks, shape.batch), HEADS * 128, bytes, stream, in);
    };
    if constexpr (K::P == 1)
      if (in.group % 2 == 0) return run(exact_backward_queries<K, 2>, std::integral_constant<int, 2>{});
    return run(exact_backward_queries<K, 1>, std::integral_constant<int, 1>{});
  });
}

}  // namespace still
