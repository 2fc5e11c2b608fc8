// dq of the exact branch: as the forward pass, one product more a tile. The linear branch's share waits in d_q.
#include "backward_steps.cuh"
#include "key_stream.cuh"
#include "wgmma.cuh"

namespace still {

// What the forward pass and the linear branch have left for a lane's two queries.
struct QueryStats {
  float level[2], delta[2], inner[2];  // p = 2^(logit - level)
  int arg_max[2];

  template <class T, int HEADS>
  __device__ __forceinline__ QueryStats(const Backward<T>& in, const QueryBlock<HEADS>& at, bool alone) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = at.start + at.row(half);
      const int64_t from = (int64_t(at.b) * in.heads + at.head) * in.tokens + t;
      const bool on = t < in.tokens;
      level[half] = on ? in.maximum[from] * LOG2E + log2f(in.denominator[from]) : INFINITY;
      delta[half] = on ? -in.minus_delta[from] : 0.f;
      inner[half] = on && !alone ? in.inner[from] : 0.f;
      arg_max[half] = on ? in.arg_max[from] : 0;
    }
  }
};

// Products of queries and stage i's keys become weights.
template <int HEADS>
__device__ __forceinline__ void recompute_weights(float (&s)[8][4], const QueryBlock<HEADS>& at, const QueryStats& stats, float scale, int flags,
                                                  int i) {
  const bool causal = at.is_own(i), ragged = at.is_ragged(i);
  each_sum(s, [&](float& x, int half, int column) {
    x = exp2_fast(x * scale - stats.level[half]);
    if ((causal && !sees_in_chunk(flags, at.row(half), column)) || (ragged && (i - at.window) * CHUNK + column >= at.seen)) x = 0.f;
  });
}

// Adds what the arg-max key gets for the linear branch and that branch's own share, which waits in d_q, and leaves d_q.
template <class T, int HEADS, int NT>
__device__ __forceinline__ void leave_gradients(const Backward<T>& in, const QueryBlock<HEADS>& at, const QueryStats& stats, float natural,
                                                float (&d_q)[NT][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = at.start + at.row(half);
    T* to = in.d_q.row(at.b, at.head, t);
    if (at.linear && t < in.tokens) {
      const T *share = to + lane % 4 * 2, *key = in.k.row(at.b, at.kv, stats.arg_max[half]) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 x = read_pair(share + n * 8), k = read_pair(key + n * 8);
        d_q[n][half * 2] += stats.inner[half] * k.x + x.x / natural;
        d_q[n][half * 2 + 1] += stats.inner[half] * k.y + x.y / natural;
      }
    }
    __syncwarp();
    store_row(t < in.tokens, to, d_q, half, natural);
  }
}

// Blocks of a multiprocessor, where the compiler would spend registers that one of them needs.
template <class K, int HEADS>
constexpr int QUERY_BLOCKS = WARPGROUP<K::P, K::D> && K::D == 64 && HEADS == 1 ? 3 : 1;

template <class K, int HEADS>
__global__ void __launch_bounds__(HEADS * 128, QUERY_BLOCKS<K, HEADS>) exact_backward_queries(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using Queries = Tile<P, HEADS * CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 keys, 64 values
  extern __shared__ unsigned char memory[];
  const Queries queries{aligned(memory)}, d_outs{queries.base + Queries::BYTES};
  auto stage = [&](int i) { return Stage{d_outs.base + Queries::BYTES + i % 2 * Stage::BYTES}; };
  const QueryBlock<HEADS> at(in, 0);
  const bool alone = sees_itself_alone(in.flags, at.kept);
  const int group_row = threadIdx.x / 128 * CHUNK;

  KeyStream<T, D, HEADS * 128> keys{in.k, in.v, at.list, at.b, at.kv, at.start, at.seen, in.tokens, at.window, at.stages};
  at.load(queries, in.q, in.tokens);
  at.load(d_outs, in.d_out, in.tokens);
  keys.look_up(0);
  keys.load(0, stage(0));
  const QueryStats stats(in, at, alone);
  float d_q[NT][4];
  clear(d_q);
  const float natural = rsqrtf(float(D)), scale = natural * LOG2E;
  for (int i = 0; i < at.stages; i++) {
    copy_wait<0>();
    publish();
    __syncthreads();
    keys.load(i + 1, stage(i + 1));
    const Stage tile = stage(i);
    float s[8][4], d[8][4];
    start_tile_product<KS>(s, queries, group_row, tile, 0);
    start_tile_product<KS>(d, d_outs, group_row, tile, CHUNK);
    finish<P, D, 1>();
    hold_sums(s);
    recompute_weights(s, at, stats, scale, in.flags, i);
    finish<P, D>();
    hold_sums(d);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= alone ? 0.f : d[n][e] - stats.delta[e / 2];
    Left<P> ds[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(ds[k], s[2 * k], s[2 * k + 1]);
    add_product<4, NT>(d_q, ds, tile, 0);
  }
  leave_gradients(in, at, stats, natural, d_q);
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
