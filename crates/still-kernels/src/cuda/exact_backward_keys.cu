// dk and dv of the exact branch, 64 keys a block: a chunk's keys against the queries of the chunk and the one after (the results
// start d_k and d_v), or 64 salient tokens against a share of the queries of all chunks that see them (partial sums). Under a
// cap that ends where the last of the 64 has been demoted. Everything is transposed: a warp owns 16 keys, a column is a query.
#include "backward_steps.cuh"
#include "key_block.cuh"
#include "wgmma.cuh"

namespace still {

// Products of keys with a chunk's queries become weights: 0 where a query does not see the key.
template <class T, Keys KEYS>
__device__ __forceinline__ void recompute_weights(float (&s)[8][4], const KeyBlock<T, KEYS>& at, const LaneKeys<T, KEYS>& keys,
                                                  const QueryColumns& columns, float scale, int chunk) {
  constexpr bool WINDOW = KEYS == OF_WINDOW;
  const int lane = threadIdx.x % 32;
  // Which of this lane's two keys each column sees; nearly always both.
  const bool causal = WINDOW && chunk == at.tile;
  const int visible = WINDOW ? at.in.tokens - at.tile * CHUNK : (chunk - 1) * at.budget - at.tile * CHUNK;
  const bool masked = KEYS == CAPPED || causal || visible < CHUNK;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const float2 level = two(&columns.level[n * 8 + lane % 4 * 2]);
#pragma unroll
    for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - (e % 2 ? level.y : level.x));
  }
  if (!masked) return;
  each_sum(s, [&](float& x, int half, int column) {
    const int row = keys.row + half * 8;
    bool sees = row < visible && (!causal || sees_in_chunk(at.in.flags, column, row));
    if (KEYS == CAPPED && chunk >= keys.absorbed_at[half]) sees = false;
    if (!sees) x = 0.f;
  });
}

// Weights and products of values with d_out become gradients of logits. `alone`: queries see none but their own key, whose weight
// does not depend on its logit.
template <class T, Keys KEYS>
__device__ __forceinline__ void logit_gradients(float (&d)[8][4], const float (&weights)[8][4], const LaneKeys<T, KEYS>& keys,
                                                const QueryColumns& columns, bool alone) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const int column = n * 8 + lane % 4 * 2;
    const float2 delta = two(&columns.delta[column]), inner = two(&columns.inner[column]);
    const int2 arg_max = two(&columns.arg_max[column]);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      d[n][e] = weights[n][e] * (d[n][e] - (e % 2 ? delta.y : delta.x));
      if (keys.token[e / 2] == (e % 2 ? arg_max.y : arg_max.x) && weights[n][e] > 0.f) d[n][e] += e % 2 ? inner.y : inner.x;
      if (alone) d[n][e] = 0.f;
    }
  }
}

template <class K, Keys KEYS>
__global__ void __launch_bounds__(128, K::P == 1 ? 2 : 1) exact_backward_keys(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  constexpr bool WINDOW = KEYS == OF_WINDOW;
  using RowsTile = Tile<P, CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 queries, their d_out
  extern __shared__ unsigned char memory[];
  __shared__ QueryColumns columns[2];
  const RowsTile keys{aligned(memory)}, values{keys.base + RowsTile::BYTES};
  auto stage = [&](int i) { return Stage{values.base + RowsTile::BYTES + i % 2 * Stage::BYTES}; };

  const KeyBlock<T, KEYS> at(in);
  const int steps = at.steps();
  auto load = [&](int i) {
    if (i < steps) {
      const int head = at.head_of(i), start = at.chunk_of(i) * CHUNK;
      load_matrix<128, CHUNK>(stage(i), 0, in.q.row(at.b, head, start), in.q.token, in.tokens - start);
      load_matrix<128, CHUNK>(stage(i), CHUNK, in.d_out.row(at.b, head, start), in.d_out.token, in.tokens - start);
      columns[i % 2].load(in, at.b, head, start);
    }
    copy_commit();
  };
  auto load_keys = [&](RowsTile to, const Rows<const T>& rows) {
    load_rows<128>(to, 0, CHUNK, rows.data, [&](int r) { int t = at.token_of(r); return t < 0 ? nullptr : rows.row(at.b, at.kv, t); });
  };
  load_keys(keys, in.k);
  load_keys(values, in.v);
  load(0);
  const LaneKeys<T, KEYS> mine(at);

  float d_k[NT][4], d_v[NT][4];
  clear(d_k);
  clear(d_v);
  const float natural = rsqrtf(float(D)), scale = natural * LOG2E;
  for (int i = 0; i < steps; i++) {
    copy_wait<0>();
    publish();
    __syncthreads();
    load(i + 1);
    const Stage queries = stage(i);
    const int chunk = at.chunk_of(i);
    float s[8][4], d[8][4];
    start_tile_product<KS>(s, keys, 0, queries, 0);
    start_tile_product<KS>(d, values, 0, queries, CHUNK);
    finish<P, D, 1>();
    hold_sums(s);
    recompute_weights(s, at, mine, columns[i % 2], scale, chunk);
    Left<P> p[4], ds[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
    start_add_product<4>(d_v, p, queries, CHUNK);
    finish<P, D, 1>();
    hold_sums(d);
    const bool alone = WINDOW && sees_itself_alone(in.flags, kept_tokens(in.routing.cap, in.routing.budgets[at.kv], max(chunk - 1, 0)));
    logit_gradients(d, s, mine, columns[i % 2], alone);
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(ds[k], d[2 * k], d[2 * k + 1]);
    start_add_product<4>(d_k, ds, queries, 0);
    finish<P, D>();
    hold_sums(d_v);
    hold_sums(d_k);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if constexpr (WINDOW) {
      const bool on = mine.token[half] >= 0;
      store_row(on, in.d_k.row(at.b, at.kv, mine.token[half]), d_k, half, natural);
      store_row(on, in.d_v.row(at.b, at.kv, mine.token[half]), d_v, half, 1.f);
    } else {
      float* to = in.partial + ((int64_t(at.b) * gridDim.x + blockIdx.x) * 2 * CHUNK + mine.row + half * 8) * D;
      store_row(true, to, d_k, half, natural);
      store_row(true, to + CHUNK * D, d_v, half, 1.f);
    }
  }
}

template <class K>
constexpr int keys_bytes = 2 * Tile<K::P, CHUNK, K::D>::BYTES + 2 * Tile<K::P, 128, K::D>::BYTES + ALIGNMENT;

int step_window(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    return launch(exact_backward_keys<K, OF_WINDOW>, dim3(in.chunks, shape.kv_heads, shape.batch), 128, keys_bytes<K>, stream, in);
  });
}

int step_salient(const StillShape& shape, const StillBackward& args, StillStream stream) {
  if (shape.flags & STILL_NO_SALIENT) return cudaSuccess;
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    return launch(args.routing.cap == STILL_NO_CAP ? exact_backward_keys<K, SALIENT> : exact_backward_keys<K, CAPPED>, dim3(in.units, 1, shape.batch), 128, keys_bytes<K>, stream, in);
  });
}

}  // namespace still
