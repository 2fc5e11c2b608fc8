// The linear branch of 64 queries of one head: its numerator goes to `out`, its share of the denominator to `denominator`;
// the exact pass adds its own. Neither is rescaled by the maximum, so the two passes need nothing of each other.
//
// phi stays unnormalised in registers: minus' half of the product comes first, is brought to plus' scale by its row, and
// both are divided by plus' sum when they leave. Chunks go upwards and the exact pass downwards: it finds the last in cache.
#include "forward.cuh"
#include "np_map.cuh"
#include "wgmma.cuh"

namespace still {

// Whether shared memory has room for one square of D x D alone, where W, S of minus and S of plus take turns.
template <class K>
constexpr bool ALONE = K::D > 128;

// phi of a lane's two queries, unnormalised, as left operands, and what brings products with them to scale.
template <int P, int KS>
struct QueryFeatures {
  Left<P> plus[KS], minus[KS];
  float scale_plus[2], ratio[2];  // lambda over plus' sum; plus' sum over minus'
  float share[2];                 // of the denominator

  // `f` = q W comes in; it is not needed afterwards. `z`: of the state, from the lane's first column on.
  template <int NT>
  __device__ __forceinline__ void make(float (&f)[NT][4], const float (&squared)[2], const float* z, float lambda, int flags) {
    constexpr int D = KS * 16;
    const NpScale u = np_scale(f, squared, flags);
    float up[2] = {0.f, 0.f}, down[2] = {0.f, 0.f}, z_up[2] = {0.f, 0.f}, z_down[2] = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < KS; k++) {
      float y[2][4];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int n = 2 * k + j;
        const float2 zu = read_pair(z + n * 8), zd = read_pair(z + D + n * 8);
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float x = f[n][e] * u.scale[e / 2];
          f[n][e] = exp2_fast(x - u.top[e / 2]);
          y[j][e] = exp2_fast(u.bottom[e / 2] - x);
          up[e / 2] += f[n][e];
          down[e / 2] += y[j][e];
          z_up[e / 2] += f[n][e] * (e % 2 ? zu.y : zu.x);
          z_down[e / 2] += y[j][e] * (e % 2 ? zd.y : zd.x);
        }
      }
      to_left(plus[k], f[2 * k], f[2 * k + 1]);
      to_left(minus[k], y[0], y[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      up[half] = row_sum(up[half]);
      down[half] = row_sum(down[half]);
      scale_plus[half] = lambda / up[half];
      ratio[half] = up[half] / down[half];
      share[half] = row_sum(z_up[half]) * scale_plus[half] + row_sum(z_down[half]) * lambda / down[half];
    }
  }
};

// Leaves numerators and the share of the denominator; where there is a gate, `out` gets numerators times it, `linear` without.
template <class T, int P, int KS, int NT>
__device__ __forceinline__ void leave_numerators(const Forward<T>& in, int head, int start, const QueryFeatures<P, KS>& phi,
                                                 float (&out)[NT][4]) {
  const int lane = threadIdx.x % 32, b = blockIdx.z;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = start + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
    const bool on = t < in.tokens;
    if (in.linear.data) store_row(on, in.linear.row(b, head, t), out, half, phi.scale_plus[half]);
    if (in.gate.data) {
      const int from = in.gate_from ? in.gate_from[b] : 0, until = in.gate_until ? in.gate_until[b] : in.tokens;
      if (t >= from && t < until) {
        const T* gate = in.gate.row(b, head, t - from) + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const float2 x = read_pair(gate + n * 8);
          out[n][half * 2] *= x.x;
          out[n][half * 2 + 1] *= x.y;
        }
      }
    }
    __syncwarp();
    store_row(on, in.out.row(b, head, t), out, half, phi.scale_plus[half]);
    if (on && lane % 4 == 0) in.denominator[(int64_t(b) * in.heads + head) * in.tokens + t] = phi.share[half];
  }
}

template <class K>
__global__ void __launch_bounds__(128, K::P == 1 && !ALONE<K> ? 3 : 1) linear_forward(const Forward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using Queries = Tile<P, CHUNK, D>;
  using Square = Tile<P, D, D>;
  extern __shared__ unsigned char memory[];
  const uint32_t base = aligned(memory);
  const Square first{base}, second{ALONE<K> ? base : base + Square::BYTES};
  const Queries queries{base + Square::BYTES};
  const int first_state = first_state_chunk(in.routing);
  const int head = blockIdx.x, chunk = max(first_state, in.first_chunk) + blockIdx.y, start = chunk * CHUNK, b = blockIdx.z;
  const int kv = head / in.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int retired = retired_before(in.routing, b) + max(chunk - 1, 0), absorbed = retired * CHUNK - kept_tokens(in.routing.cap, in.routing.budgets[kv], retired);
  if (absorbed == 0) return;  // the exact pass knows it too

  load_matrix<128, CHUNK>(queries, 0, in.q.row(b, head, start), in.q.token, in.tokens - start);
  const T* w = in.w_q + int64_t(head) * D * D;
  load_matrix<128, D>(first, 0, w, D);
  copy_commit();
  copy_wait<0>();
  publish();
  __syncthreads();
  QueryFeatures<P, KS> phi;
  {
    Left<P> q[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(q[i], queries, warp * 16, i * 16);
    float f[NT][4], squared[2];
    squared_norms(q, squared);
    clear(f);
    if (!ALONE<K>) __syncthreads();  // the queries' memory is the state's from here
    const int64_t entry = bk * (in.chunks - first_state) + chunk - first_state;
    const T* s = in.s + entry * 2 * D * D;
    if (!ALONE<K>) {
      load_matrix<128, D>(second, 0, s + D * D, D);
      copy_commit();
    }
    add_product<KS, NT>(f, q, first, 0);
    __syncthreads();
    load_matrix<128, D>(first, 0, ALONE<K> ? s + D * D : s, D);
    copy_commit();
    const float lambda = linear_scale(in.log_scale, in.flags, head, absorbed);
    const float* z = in.z + entry * 2 * D + lane % 4 * 2;
    phi.make(f, squared, z, lambda, in.flags);
  }
  float out[NT][4];
  clear(out);
  copy_wait<ALONE<K> ? 0 : 1>();
  publish();
  __syncthreads();
  add_product<KS, NT>(out, phi.minus, second, 0);
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) out[n][e] *= phi.ratio[e / 2];
  if (ALONE<K>) {
    __syncthreads();
    load_matrix<128, D>(first, 0, in.s + (bk * (in.chunks - first_state) + chunk - first_state) * 2 * D * D, D);
    copy_commit();
  }
  copy_wait<0>();
  publish();
  __syncthreads();
  add_product<KS, NT>(out, phi.plus, first, 0);
  leave_numerators(in, head, start, phi, out);
}

template <class K>
int run_linear_forward(const StillShape& shape, const Forward<typename K::T>& in, StillStream stream) {
  const int first_state = first_state_chunk(in.routing), first = first_state > in.first_chunk ? first_state : in.first_chunk;
  if (in.chunks <= first) return cudaSuccess;
  using Queries = Tile<K::P, CHUNK, K::D>;
  using Square = Tile<K::P, K::D, K::D>;
  static_assert(Square::BYTES >= Queries::BYTES);
  constexpr int bytes = Square::BYTES + (ALONE<K> ? Queries::BYTES : Square::BYTES) + ALIGNMENT;
  return launch(linear_forward<K>, dim3(shape.heads, in.chunks - first, shape.batch), 128, bytes, stream, in);
}

}  // namespace still

extern "C" int still_linear_forward(const StillShape* shape, const StillForward* args, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    return still::run_linear_forward<K>(*shape, still::Forward<typename K::T>(*shape, *args), stream);
  });
}
