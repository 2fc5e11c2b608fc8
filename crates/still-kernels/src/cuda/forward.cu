// The hybrid attention of one chunk's queries: salient tokens, window and linear state in one pass.
//
// A block answers 64 queries of HEADS query heads of one KV head, a warp 16 of them. What is multiplied streams through a
// ring of stages of 128 rows: keys and values of 64 tokens (salient, then window) with an online softmax; then, once the
// true maximum is known, the map W of each head and the two halves of the state, which is not rescaled.
#include "launch.cuh"
#include "np_map.cuh"

namespace still {

template <class T>
struct Forward {
  Rows<const T> q, k, v;
  Rows<T> out;
  const T *w_q, *s;
  const float *log_scale, *z;
  const int32_t *budgets, *salient;
  float *maximum, *denominator;
  int32_t* arg_max;
  int tokens, heads, kv_heads, group, chunks;
};

template <class K, int HEADS>
__global__ void __launch_bounds__(HEADS * 128, 1) forward(const Forward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, THREADS = HEADS * 128, STAGES = 3;
  constexpr float LOG2E = 1.4426950408889634f;
  using Stage = Tile<P, 128, D>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  auto stage = [&](int i) { return Stage{base + i % STAGES * Stage::BYTES}; };

  const int parts = in.group / HEADS, chunk = in.chunks - 1 - blockIdx.y, start = chunk * CHUNK;  // the longest first
  const int kv = blockIdx.x / parts, first_head = kv * in.group + blockIdx.x % parts * HEADS, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = first_head + warp / 4, first_row = warp % 4 * 16;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;

  const int retired = max(chunk - 1, 0), budget = in.budgets[kv];
  const int kept = retired * budget, absorbed = retired * (CHUNK - budget);
  const int salient_stages = (kept + CHUNK - 1) / CHUNK, exact_stages = salient_stages + (chunk > 0) + 1;
  const bool linear = absorbed > 0;
  const int stages = exact_stages + (linear ? HEADS + 2 : 0);
  const int32_t* list = in.salient + bk * in.tokens;

  auto load = [&](int i) {
    if (i < exact_stages) {
      const bool is_salient = i < salient_stages;
      const int from = is_salient ? i * CHUNK : start - (exact_stages - 1 - i) * CHUNK, to = is_salient ? kept : in.tokens;
      load_rows<THREADS>(stage(i), 0, 128, in.k.data, [&](int r) -> const T* {
        int t = from + r % CHUNK;
        if (t >= to) return nullptr;
        if (is_salient) t = list[t];
        return r < CHUNK ? in.k.row(b, kv, t) : in.v.row(b, kv, t);
      });
    } else if (i < exact_stages + HEADS) {
      const T* w = in.w_q + int64_t(first_head + i - exact_stages) * D * D;
      if (i < stages) load_rows<THREADS>(stage(i), 0, D, w, [&](int r) { return w + r * D; });
    } else if (i < stages) {
      const T* s = in.s + ((bk * (in.chunks - 2) + chunk - 2) * 2 + (i - exact_stages - HEADS)) * D * D;
      load_rows<THREADS>(stage(i), 0, D, s, [&](int r) { return s + r * D; });
    }
    copy_commit();
  };

  load_rows<THREADS>(stage(2), 0, HEADS * CHUNK, in.q.data, [&](int r) {
    int t = start + r % CHUNK;
    return t < in.tokens ? in.q.row(b, first_head + r / CHUNK, t) : nullptr;
  });
  copy_commit();
  load(0);
  load(1);
  copy_wait<2>();
  __syncthreads();
  Left<P> q[KS];
#pragma unroll
  for (int i = 0; i < KS; i++) load_left(q[i], stage(2), warp * 16, i * 16);

  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // m in base 2
  int arg_max[2] = {0, 0};
  clear(out);
  const float scale = rsqrtf(float(D)) * LOG2E;
  auto next = [&](int i) {
    copy_wait<1>();
    __syncthreads();
    load(i + 2);
    return stage(i);
  };

  for (int i = 0; i < exact_stages; i++) {
    const Stage tile = next(i);
    float s[8][4];
    clear(s);
    product_nt<KS, 8>(s, q, tile, 0);
    if (i == exact_stages - 1) {  // this chunk: no key after the query
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (n * 8 + lane % 4 * 2 + e % 2 > first_row + lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
    } else if (i < salient_stages && (i + 1) * CHUNK > kept) {
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (i * CHUNK + n * 8 + lane % 4 * 2 + e % 2 >= kept) s[n][e] = -INFINITY;
    }
    float raised[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      top = row_max(top);
      raised[half] = fmaxf(m[half], top * scale);
      if (in.arg_max && raised[half] > m[half]) {  // seldom; of the row's four lanes the one that found it keeps it
        arg_max[half] = 0;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (s[n][half * 2 + e] == top) arg_max[half] = i * CHUNK + n * 8 + lane % 4 * 2 + e;
      }
      const float shrink = exp2_fast(m[half] - raised[half]);
      m[half] = raised[half];
      sum[half] *= shrink;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        out[n][half * 2] *= shrink;
        out[n][half * 2 + 1] *= shrink;
      }
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[n][half * 2 + e];
          x = exp2_fast(x * scale - raised[half]);
          sum[half] += x;
        }
    }
    Left<P> p[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
    product_nn<4, NT>(out, p, tile, CHUNK);
  }
  sum[0] = row_sum(sum[0]);
  sum[1] = row_sum(sum[1]);

  if (linear) {
    float squared[2], lambda = 1.f;
    if (in.log_scale) lambda = expf(in.log_scale[head]) / absorbed;
    squared_norms(q, squared);
    Left<P> plus[KS], minus[KS];
#pragma unroll 1
    for (int h = 0; h < HEADS; h++) {
      const Stage tile = next(exact_stages + h);
      if (head != first_head + h) continue;
      float f[NT][4], g[NT][4];
      clear(f);
      product_nn<KS, NT>(f, q, tile, 0);
      np_map(f, g, squared);
      const float* z = in.z + (bk * (in.chunks - 2) + chunk - 2) * 2 * D + lane % 4 * 2;
      float share[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 up = *reinterpret_cast<const float2*>(z + n * 8), down = *reinterpret_cast<const float2*>(z + D + n * 8);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          f[n][e] *= lambda;
          g[n][e] *= lambda;
          share[e / 2] += f[n][e] * (e % 2 ? up.y : up.x) + g[n][e] * (e % 2 ? down.y : down.x);
        }
      }
      sum[0] += row_sum(share[0]);
      sum[1] += row_sum(share[1]);
#pragma unroll
      for (int k = 0; k < KS; k++) {
        to_left(plus[k], f[2 * k], f[2 * k + 1]);
        to_left(minus[k], g[2 * k], g[2 * k + 1]);
      }
    }
    product_nn<KS, NT>(out, plus, next(exact_stages + HEADS), 0);
    product_nn<KS, NT>(out, minus, next(exact_stages + HEADS + 1), 0);
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + first_row + lane / 4 + half * 8;
    if (in.arg_max) {
      int at = max(arg_max[half], __shfl_xor_sync(0xffffffffu, arg_max[half], 1));
      arg_max[half] = max(at, __shfl_xor_sync(0xffffffffu, at, 2));
    }
    if (t >= in.tokens) continue;
    const float inverse = 1.f / sum[half];
    T* to = in.out.row(b, head, t) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < NT; n++) store_pair(to + n * 8, out[n][half * 2] * inverse, out[n][half * 2 + 1] * inverse);
    if (in.maximum && lane % 4 == 0) {
      const int64_t at = (int64_t(b) * in.heads + head) * in.tokens + t;
      const int tile = arg_max[half] >> 6, column = arg_max[half] & 63;
      in.maximum[at] = m[half] / LOG2E;
      in.denominator[at] = sum[half];
      in.arg_max[at] = tile < salient_stages ? list[tile * CHUNK + column] : start - (exact_stages - 1 - tile) * CHUNK + column;
    }
  }
}

}  // namespace still

extern "C" int still_forward(const StillShape* shape, const StillForward* args, StillStream stream) {
  return still::dispatch(*shape, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    const int group = shape->heads / shape->kv_heads, chunks = still::chunks(*shape);
    still::Forward<T> in{
        args->q, args->k, args->v, args->out, static_cast<const T*>(args->w_q), static_cast<const T*>(args->s), args->log_scale,
        args->z, args->budgets, args->salient, args->maximum, args->denominator, args->arg_max, shape->tokens, shape->heads,
        shape->kv_heads, group, chunks};
    constexpr int bytes = 3 * still::Tile<K::P, 128, K::D>::BYTES;
    auto run = [&](auto kernel, int heads) {
      return still::launch(kernel, dim3(shape->heads / heads, chunks, shape->batch), heads * 128, bytes, stream, in);
    };
    return group % 2 == 0 ? run(still::forward<K, 2>, 2) : run(still::forward<K, 1>, 1);
  });
}
