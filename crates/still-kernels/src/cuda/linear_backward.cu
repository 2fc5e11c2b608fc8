// Gradients of the linear branch of 64 queries of one head: of q through the map, of f (for W_q), and what the gradients of
// the states are made of. Also delta = d_out . out of every row.
#include "backward_steps.cuh"
#include "np_map.cuh"
#include "wgmma.cuh"

namespace still {

template <class K>
__global__ void __launch_bounds__(128, K::P == 1 ? 2 : 1) linear_backward(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using RowsTile = Tile<P, CHUNK, D>;
  using Square = Tile<P, D, D>;
  extern __shared__ unsigned char memory[];
  const uint32_t base = aligned(memory);
  const RowsTile d_outs{base};
  const Square weights{base + RowsTile::BYTES}, halves[2] = {{weights.base + Square::BYTES}, {weights.base + 2 * Square::BYTES}};
  const RowsTile queries{halves[1].base};
  const int head = blockIdx.x, chunk = in.chunks - 1 - blockIdx.y, start = chunk * CHUNK, b = blockIdx.z;
  const int kv = head / in.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bk = int64_t(b) * in.kv_heads + kv, bh = int64_t(b) * in.heads + head;
  const int absorbed = max(chunk - 1, 0) * (CHUNK - in.budgets[kv]);
  const int row = warp * 16 + lane / 4;

  // delta
  float delta[2] = {0.f, 0.f};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + row + half * 8;
    if (t < in.tokens) {
      const T *o = in.out.row(b, head, t) + lane % 4 * 2, *g = in.d_out.row(b, head, t) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 x = read_pair(o + n * 8), y = read_pair(g + n * 8);
        delta[half] += x.x * y.x + x.y * y.y;
      }
    }
    delta[half] = row_sum(delta[half]);
    if (t < in.tokens && lane % 4 == 0) {
      in.minus_delta[bh * in.tokens + t] = -delta[half];
      if (absorbed == 0) in.inner[bh * in.tokens + t] = 0.f;
    }
  }
  if (absorbed == 0) return;

  const T *w = in.w_q + int64_t(head) * D * D, *s = in.s + (bk * (in.chunks - 2) + chunk - 2) * 2 * D * D;
  load_matrix<128, CHUNK>(queries, 0, in.q.row(b, head, start), in.q.token, in.tokens - start);
  load_matrix<128, D>(weights, 0, w, D);
  copy_commit();
  load_matrix<128, CHUNK>(d_outs, 0, in.d_out.row(b, head, start), in.d_out.token, in.tokens - start);
  load_matrix<128, D>(halves[0], 0, s + D * D, D);
  copy_commit();
  copy_wait<1>();
  publish();
  __syncthreads();
  float f[NT][4], squared[2];
  {
    Left<P> q[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(q[i], queries, warp * 16, i * 16);
    squared_norms(q, squared);
    clear(f);
    add_product<KS, NT>(f, q, weights, 0);
  }
  __syncthreads();  // the queries' memory is the state's from here
  load_matrix<128, D>(halves[1], 0, s, D);
  copy_commit();

  // phi, times lambda / den, for the gradients of the states
  float factor[2];
  {
    const float lambda = in.log_scale ? expf(in.log_scale[head]) / absorbed : 1.f;
    float plus[NT][4], minus[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) plus[n][e] = f[n][e];
    np_map(plus, minus, squared);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = start + row + half * 8;
      factor[half] = t < in.tokens ? lambda / in.denominator[bh * in.tokens + t] : 0.f;
      T* to = in.phi_q + (bh * in.tokens + t) * 2 * D;
      store_row(t < in.tokens, to, plus, half, factor[half]);
      store_row(t < in.tokens, to + D, minus, half, factor[half]);
    }
  }

  // dphi = lambda / den (S d_out - delta z)
  const float* z = in.z + (bk * (in.chunks - 2) + chunk - 2) * 2 * D + lane % 4 * 2;
  float inner[2], radial[2];
  np_map_backward(
      f, squared,
      [&](float (&d)[NT][4], int part) {
        copy_wait<0>();
        publish();
        __syncthreads();
        tile_product<KS>(d, d_outs, 0, halves[part], 0);
        const float* zs = z + (part ? 0 : D);
#pragma unroll
        for (int n = 0; n < NT; n++) {
          float2 x = read_pair(zs + n * 8);
#pragma unroll
          for (int e = 0; e < 4; e++) d[n][e] = factor[e / 2] * (d[n][e] - delta[e / 2] * (e % 2 ? x.y : x.x));
        }
      },
      inner, radial);

  Left<P> df[KS];
#pragma unroll
  for (int k = 0; k < KS; k++) to_left(df[k], f[2 * k], f[2 * k + 1]);
  float d_q[NT][4];
  clear(d_q);
  add_product_nt<KS, NT>(d_q, df, weights, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + row + half * 8;
    const bool on = t < in.tokens;
    if (on && lane % 4 == 0) in.inner[bh * in.tokens + t] = inner[half];
    if (on) {
      const T* x = in.q.row(b, head, t) + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 q = read_pair(x + n * 8);
        d_q[n][half * 2] += radial[half] * q.x;
        d_q[n][half * 2 + 1] += radial[half] * q.y;
      }
    }
    __syncwarp();
    store_row(on, in.d_q.row(b, head, t), d_q, half, 1.f);
    store_row(on, in.df_q + (bh * in.tokens + t) * D, f, half, 1.f);
  }
}

int step_linear(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    constexpr int bytes = Tile<K::P, CHUNK, K::D>::BYTES + 3 * Tile<K::P, K::D, K::D>::BYTES + ALIGNMENT;
    return launch(linear_backward<K>, dim3(shape.heads, in.chunks, shape.batch), 128, bytes, stream, in);
  });
}

}  // namespace still
