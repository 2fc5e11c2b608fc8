// Gradients of the linear branch of 64 queries of one head: of q through the map, of f (for W_q), and what the gradients of
// the states are made of. Also delta = d_out . out of every row, and the gate's gradient. Two warpgroups, each with half of the
// columns.
#include "backward_steps.cuh"
#include "np_map_backward.cuh"
#include "wgmma.cuh"

namespace still {

// What a thread has of its block's 64 queries: two rows, 8 apart, and half of their columns.
template <class T>
struct LinearRows {
  int b, head, start;  // `start`: the chunk's first token
  int row, col;        // the first row; the first column of the warpgroup
  int absorbed;        // tokens in the state that the queries see
  int64_t bh;

  __device__ __forceinline__ int token(int half) const { return start + row + half * 8; }
  __device__ __forceinline__ int64_t at(const Backward<T>& in, int half) const { return bh * in.tokens + token(half); }
  // Of the rows' eight lanes one writes.
  __device__ __forceinline__ bool writes() const { return threadIdx.x < 128 && threadIdx.x % 4 == 0; }
};

// delta = d_out . out of the lane's columns, and the gate's gradient.
template <int NT, class T, class TILE>
__device__ __forceinline__ void output_deltas(const Backward<T>& in, const LinearRows<T>& at, TILE d_outs, float (&delta)[2]) {
  const int my_col = at.col + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = at.token(half);
    if (t >= in.tokens) continue;
    const T* o = in.out.row(at.b, at.head, t) + my_col;
    if (!in.d_gate.data) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 x = read_pair(o + n * 8), y = read_pair(d_outs, at.row + half * 8, my_col + n * 8);
        delta[half] += x.x * y.x + x.y * y.y;
      }
      continue;
    }
    const T* d_out = in.d_out.row(at.b, at.head, t) + my_col;
    T* d_gate = in.d_gate.row(at.b, at.head, t) + my_col;
    const float share = at.absorbed > 0 ? 1.f / in.denominator[at.at(in, half)] : 0.f;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float2 x = read_pair(o + n * 8), y = read_pair(d_out + n * 8), z = make_float2(0.f, 0.f);
      delta[half] += x.x * y.x + x.y * y.y;
      if (at.absorbed > 0) z = read_pair(in.linear.row(at.b, at.head, t) + my_col + n * 8);
      store_pair(d_gate + n * 8, y.x * z.x * share, y.y * z.y * share);
    }
  }
}

// Leaves the deltas; of queries that see no state also that the linear branch adds nothing.
template <class T>
__device__ __forceinline__ void leave_deltas(const Backward<T>& in, const LinearRows<T>& at, const float (&delta)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (at.writes() && at.token(half) < in.tokens) {
      in.minus_delta[at.at(in, half)] = -delta[half];
      if (at.absorbed == 0) in.inner[at.at(in, half)] = 0.f;
    }
}

// Sums over all queries read the rows of those that see no state too.
template <int D, class T>
__device__ __forceinline__ void clear_features(const Backward<T>& in, const LinearRows<T>& at) {
  const int64_t first = at.bh * in.tokens + at.start, count = min(CHUNK, in.tokens - at.start);
  for (int64_t i = threadIdx.x; i < count * 2 * D; i += 256) in.phi_q[first * 2 * D + i] = T(0.f);
  for (int64_t i = threadIdx.x; i < count * D; i += 256) in.df_q[first * D + i] = T(0.f);
}

// A part of phi, times lambda / den, for the gradients of the states. Part 1, plus, is the first half of the features.
template <int NT, class T>
__device__ __forceinline__ void leave_features(const Backward<T>& in, const LinearRows<T>& at, int part, const float (&factor)[2],
                                               const float (&phi)[NT][4]) {
  constexpr int D = NT * 16;
#pragma unroll
  for (int half = 0; half < 2; half++)
    store_row(at.token(half) < in.tokens, in.phi_q + at.at(in, half) * 2 * D + (part ? 0 : D) + at.col, phi, half, factor[half]);
}

// S d_out becomes the gradient of a part of phi: lambda / den (S d_out - delta z).
template <int NT>
__device__ __forceinline__ void take_deltas(float (&d)[NT][4], const float (&delta)[2], const float* z, const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    float2 x = read_pair(z + n * 8);
#pragma unroll
    for (int e = 0; e < 4; e++) d[n][e] = factor[e / 2] * (d[n][e] - delta[e / 2] * (e % 2 ? x.y : x.x));
  }
}

// Leaves df and d_q, to which the gradient of |x| adds what is along q.
template <int NT, class T>
__device__ __forceinline__ void leave_gradients(const Backward<T>& in, const LinearRows<T>& at, const float (&inner)[2], const float (&radial)[2],
                                                const float (&f)[NT][4], float (&d_q)[NT][4]) {
  constexpr int D = NT * 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = at.token(half);
    const bool on = t < in.tokens;
    if (on) {
      if (at.writes()) in.inner[at.at(in, half)] = inner[half];
      add_row(d_q, half, in.q.row(at.b, at.head, t) + at.col, [&](float q) { return radial[half] * q; });
    }
    __syncwarp();
    store_row(on, in.d_q.row(at.b, at.head, t) + at.col, d_q, half, 1.f);
    store_row(on, in.df_q + at.at(in, half) * D + at.col, f, half, 1.f);
  }
}

template <class K>
__global__ void __launch_bounds__(256, K::P == 1 ? 2 : 1) linear_backward(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 16;
  using RowsTile = Tile<P, CHUNK, D>;
  using Square = Tile<P, D, D>;
  // Two blocks share a multiprocessor's memory to the last byte: nothing is left to align with.
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& exchange = *reinterpret_cast<RowHalves::Buffer*>(memory + RowsTile::BYTES + 3 * Square::BYTES);
  const uint32_t base = shared_address(memory);
  if (base % 1024 != 0) __trap();
  const RowsTile d_outs{base};  // then df
  const Square weights{base + RowsTile::BYTES}, halves[2] = {{weights.base + Square::BYTES}, {weights.base + 2 * Square::BYTES}};
  const RowsTile queries{halves[1].base};
  const int head = blockIdx.x, chunk = in.chunks - 1 - blockIdx.y, start = chunk * CHUNK, b = blockIdx.z;
  const int kv = head / in.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int retired = max(chunk - 1, 0), absorbed = retired * CHUNK - kept_tokens(in.routing.cap, in.routing.budgets[kv], retired);
  const LinearRows<T> at{b, head, start, warp % 4 * 16 + lane / 4, warp / 4 * (D / 2), absorbed, int64_t(b) * in.heads + head};
  const int64_t entry = (int64_t(b) * in.kv_heads + kv) * (in.chunks - 2) + chunk - 2;
  const T *w = in.w_q + int64_t(head) * D * D, *s = in.s + entry * 2 * D * D;
  if (absorbed > 0) {
    load_matrix<256, CHUNK>(queries, 0, in.q.row(b, head, start), in.q.token, in.tokens - start);
    load_matrix<256, D>(weights, 0, w, D);
  }
  load_matrix<256, CHUNK>(d_outs, 0, in.d_linear.row(b, head, start), in.d_linear.token, in.tokens - start);
  copy_commit();
  if (absorbed > 0) load_matrix<256, D>(halves[0], 0, s + D * D, D);
  copy_commit();

  copy_wait<1>();
  publish();
  __syncthreads();
  RowHalves rows{exchange};
  float delta[1][2] = {{0.f, 0.f}};
  output_deltas<NT>(in, at, d_outs, delta[0]);
  rows.combine<false>(delta);
  leave_deltas(in, at, delta[0]);
  if (absorbed == 0) {
    // Where a cap has let nothing go yet.
    if (retired > 0 && !keeps_all(in.routing.cap, in.routing.budgets[kv])) clear_features<D>(in, at);
    return;
  }

  float f[NT][4], squared[2], factor[2];
  squared_norms(queries, squared);
  clear(f);
  add_tile_product_nn<KS>(f, queries, weights, at.col);
  __syncthreads();  // the queries' memory is the state's from here
  load_matrix<256, D>(halves[1], 0, s, D);
  copy_commit();
  const float lambda = linear_scale(in.log_scale, in.flags, head, absorbed);
#pragma unroll
  for (int half = 0; half < 2; half++) factor[half] = at.token(half) < in.tokens ? lambda / in.denominator[at.at(in, half)] : 0.f;

  const float* z = in.z + entry * 2 * D + at.col + lane % 4 * 2;
  float inner[2], radial[2];
  np_map_backward(
      rows, f, squared, in.flags,
      [&](const float (&phi)[NT][4], int part) { leave_features(in, at, part, factor, phi); },
      [&](float (&d)[NT][4], int part) {
        if (part == 0) copy_wait<1>(); else copy_wait<0>();
        publish();
        __syncthreads();
        tile_product<KS>(d, d_outs, 0, halves[part], at.col);
        take_deltas(d, delta[0], z + (part ? 0 : D), factor);
      },
      inner, radial);

  store_tile(d_outs, at.row, at.col, f);  // all have read d_out: np_map_backward has met since
  publish();
  __syncthreads();
  float d_q[NT][4];
  tile_product<KS>(d_q, d_outs, 0, weights, at.col);
  leave_gradients(in, at, inner, radial, f, d_q);
}

int step_linear(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    constexpr int bytes = Tile<K::P, CHUNK, K::D>::BYTES + 3 * Tile<K::P, K::D, K::D>::BYTES + sizeof(RowHalves::Buffer);
    return launch(linear_backward<K>, dim3(shape.heads, in.chunks, shape.batch), 256, bytes, stream, in);
  });
}

}  // namespace still
