// dk and dv of the exact branch, 64 keys a block: a chunk's keys against the queries of the chunk and the one after (the results
// start d_k and d_v), or 64 salient tokens against a share of the queries of all chunks that see them (partial sums). Under a
// cap that ends where the last of the 64 has been demoted. Everything is transposed: a warp owns 16 keys, a column is a query.
#include "backward_steps.cuh"
#include "wgmma.cuh"

namespace still {

enum Keys { OF_WINDOW, SALIENT, CAPPED };

template <class K, Keys KEYS>
__global__ void __launch_bounds__(128, K::P == 1 ? 2 : 1) exact_backward_keys(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  constexpr bool WINDOW = KEYS == OF_WINDOW;
  using RowsTile = Tile<P, CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 queries, their d_out
  extern __shared__ unsigned char memory[];
  __shared__ float columns[2][3][CHUNK];  // level, delta, inner
  __shared__ int maxima[2][CHUNK];
  __shared__ uint32_t until;  // the chunk that sees none of the tile any more
  const RowsTile keys{aligned(memory)}, values{keys.base + RowsTile::BYTES};
  auto stage = [&](int i) { return Stage{values.base + RowsTile::BYTES + i % 2 * Stage::BYTES}; };
  const int b = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  int kv, tile, first, last;  // query chunks first..last
  int budget = 0, entries = 0;
  if (WINDOW) {
    kv = blockIdx.y;
    tile = blockIdx.x;
    first = tile;
    last = min(tile + (in.flags & STILL_NO_WINDOW ? 1 : 2), in.chunks);
  } else {
    int unit = blockIdx.x;
    SalientWork work(0, 0);
    for (kv = 0;; kv++) {
      work = SalientWork(in.routing.budgets[kv], in.chunks - 2);
      if (unit < work.units()) break;
      unit -= work.units();
    }
    budget = in.routing.budgets[kv];
    entries = budget * (in.chunks - 2);
    tile = unit / work.parts;
    const int from = tile * CHUNK / budget + 2, part = unit % work.parts;
    int count = in.chunks - from;
    if constexpr (KEYS == CAPPED) {
      if (threadIdx.x == 0) until = 0;
      __syncthreads();
      const int i = tile * CHUNK + threadIdx.x;
      const int64_t row = (int64_t(b) * in.kv_heads + kv) * in.tokens;
      if (threadIdx.x < CHUNK && i < entries) atomicMax(&until, min(in.routing.absorbed_at[row + in.routing.salient[row + i]], uint32_t(in.chunks)));
      __syncthreads();
      count = max(int(until) - from, 0);
    }
    first = from + count * part / work.parts;
    last = from + count * (part + 1) / work.parts;
  }
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int32_t* list = in.routing.salient + bk * in.tokens;
  auto token_of = [&](int r) {
    if (WINDOW) return tile * CHUNK + r < in.tokens ? tile * CHUNK + r : -1;
    return tile * CHUNK + r < entries ? list[tile * CHUNK + r] : -1;
  };
  const int steps = (last - first) * in.group;
  auto load = [&](int i) {
    if (i < steps) {
      const int head = kv * in.group + i % in.group, start = (first + i / in.group) * CHUNK;
      load_matrix<128, CHUNK>(stage(i), 0, in.q.row(b, head, start), in.q.token, in.tokens - start);
      load_matrix<128, CHUNK>(stage(i), CHUNK, in.d_out.row(b, head, start), in.d_out.token, in.tokens - start);
      if (threadIdx.x < CHUNK) {
        const int t = start + threadIdx.x;
        const int64_t at = (int64_t(b) * in.heads + head) * in.tokens + t;
        const bool on = t < in.tokens;
        columns[i % 2][0][threadIdx.x] = on ? in.maximum[at] * LOG2E + log2f(in.denominator[at]) : INFINITY;
        columns[i % 2][1][threadIdx.x] = on ? -in.minus_delta[at] : 0.f;
        columns[i % 2][2][threadIdx.x] = on ? in.inner[at] : 0.f;
        maxima[i % 2][threadIdx.x] = on ? in.arg_max[at] : -2;
      }
    }
    copy_commit();
  };
  load_rows<128>(keys, 0, CHUNK, in.k.data, [&](int r) { int t = token_of(r); return t < 0 ? nullptr : in.k.row(b, kv, t); });
  load_rows<128>(values, 0, CHUNK, in.v.data, [&](int r) { int t = token_of(r); return t < 0 ? nullptr : in.v.row(b, kv, t); });
  load(0);
  const int my_row = warp * 16 + lane / 4;
  const int my_token[2] = {token_of(my_row), token_of(my_row + 8)};  // -1: none
  int absorbed_at[2] = {0, 0};
  if constexpr (KEYS == CAPPED)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (my_token[half] >= 0) absorbed_at[half] = min(in.routing.absorbed_at[bk * in.tokens + my_token[half]], uint32_t(in.chunks));

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
    const int chunk = first + i / in.group;
    float s[8][4], d[8][4];
    start_tile_product<KS>(s, keys, 0, queries, 0);
    start_tile_product<KS>(d, values, 0, queries, CHUNK);
    // Which of this lane's two keys each column sees; nearly always both.
    const bool causal = WINDOW && chunk == tile;
    const int visible = WINDOW ? in.tokens - tile * CHUNK : (chunk - 1) * budget - tile * CHUNK;
    const bool masked = KEYS == CAPPED || causal || visible < CHUNK;
    const bool alone = WINDOW && sees_itself_alone(in.flags, kept_tokens(in.routing.cap, in.routing.budgets[kv], max(chunk - 1, 0)));
    auto sees = [&](int n, int e) {
      const int row = my_row + e / 2 * 8;
      if (KEYS == CAPPED && chunk >= absorbed_at[e / 2]) return false;
      return row < visible && (!causal || sees_in_chunk(in.flags, n * 8 + lane % 4 * 2 + e % 2, row));
    };
    finish<P, D, 1>();
    hold_sums(s);
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const float2 level = *reinterpret_cast<const float2*>(&columns[i % 2][0][n * 8 + lane % 4 * 2]);
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = exp2_fast(s[n][e] * scale - (e % 2 ? level.y : level.x));
    }
    if (masked)
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (!sees(n, e)) s[n][e] = 0.f;
    Left<P> p[4], ds[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
    start_add_product<4>(d_v, p, queries, CHUNK);
    finish<P, D, 1>();
    hold_sums(d);
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const int column = n * 8 + lane % 4 * 2;
      const float2 delta = *reinterpret_cast<const float2*>(&columns[i % 2][1][column]);
      const float2 inner = *reinterpret_cast<const float2*>(&columns[i % 2][2][column]);
      const int2 arg_max = *reinterpret_cast<const int2*>(&maxima[i % 2][column]);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        d[n][e] = s[n][e] * (d[n][e] - (e % 2 ? delta.y : delta.x));
        if (my_token[e / 2] == (e % 2 ? arg_max.y : arg_max.x) && s[n][e] > 0.f) d[n][e] += e % 2 ? inner.y : inner.x;
        if (alone) d[n][e] = 0.f;
      }
    }
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
      const bool on = my_token[half] >= 0;
      store_row(on, in.d_k.row(b, kv, my_token[half]), d_k, half, natural);
      store_row(on, in.d_v.row(b, kv, my_token[half]), d_v, half, 1.f);
    } else {
      float* to = in.partial + ((int64_t(b) * gridDim.x + blockIdx.x) * 2 * CHUNK + my_row + half * 8) * D;
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
