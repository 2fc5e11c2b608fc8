// What the keys and values of a retired chunk get beside the window's share: absorbed tokens through S += phi(k) v', z += phi(k)
// and the map, salient ones the partial sums of later queries; demoted tokens both. A block has the tokens of one entry of the
// order in which they are absorbed: without a cap a chunk's. Two warpgroups, each with half of the columns.
#include "backward_steps.cuh"
#include "np_map_backward.cuh"
#include "wgmma.cuh"

namespace still {

// Adds the salient partial sums (kind 0: k, 1: v) of list entry `entry`, from column `col`, to one row of sums.
template <int D, int NT, class T>
__device__ __forceinline__ void add_partial(float (&sums)[NT][4], int half, const Backward<T>& in, int b, int kv, int entry,
                                            int kind, int col) {
  int unit = 0;
  for (int h = 0; h < kv; h++) unit += SalientWork(in.routing.budgets[h], in.chunks - 2).units();
  const SalientWork work(in.routing.budgets[kv], in.chunks - 2);
  unit += entry / CHUNK * work.parts;
  for (int part = 0; part < work.parts; part++) {
    const float* from = in.partial + (((int64_t(b) * in.units + unit + part) * 2 + kind) * CHUNK + entry % CHUNK) * D + col;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float2 x = read_pair(from + n * 8);
      sums[n][half * 2] += x.x;
      sums[n][half * 2 + 1] += x.y;
    }
  }
}

// A block's 64 tokens, and what a thread has of them: two rows, 8 apart, and half of their columns.
template <class T, bool CAPPED>
struct AbsorbedBlock {
  int b, kv, chunk, start, budget;
  int row, col;              // the thread's first row; the warpgroup's first column
  int64_t bk, entry;         // `entry`: of the states
  const uint64_t* selected;  // of the head's chunks
  const int32_t* order;
  uint64_t kept;             // of the chunk, without a cap

  __device__ __forceinline__ AbsorbedBlock(const Backward<T>& in, int col)
      : b(blockIdx.z), kv(blockIdx.y), chunk(blockIdx.x), start(chunk * CHUNK), budget(in.routing.budgets[kv]),
        row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), col(col), bk(int64_t(b) * in.kv_heads + kv),
        entry(bk * (in.chunks - 2) + chunk), selected(in.routing.selected + bk * in.chunks), order(in.routing.order + entry * CHUNK),
        kept(CAPPED ? 0 : selected[chunk]) {
  }
  // Whether a row's token is never absorbed.
  __device__ __forceinline__ bool is_exact(int r) const { return CAPPED ? order[r] < 0 : (kept >> r & 1) != 0; }
  __device__ __forceinline__ int token_of(int r) const { return !CAPPED ? start + r : order[r] < 0 ? ~order[r] : order[r]; }
  // The block's rows of something that lies in the order in which tokens are absorbed.
  __device__ __forceinline__ int64_t first(const Backward<T>& in) const { return bk * in.tokens + start; }

  template <class TILE>
  __device__ __forceinline__ void load(TILE to, const Rows<const T>& from) const {
    if constexpr (CAPPED) load_rows<256>(to, 0, CHUNK, from.data, [&](int r) { return from.row(b, kv, token_of(r)); });
    else load_matrix<256, CHUNK>(to, 0, from.row(b, kv, start), from.token);
  }

  // Adds what salient tokens get of later queries (kind 0: k, 1: v) and what the window's share has left in `to_rows`, and leaves all.
  template <int NT>
  __device__ __forceinline__ void leave(const Backward<T>& in, float (&sums)[NT][4], const Rows<T>& to_rows, int kind) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = token_of(row + half * 8), of = CAPPED ? t / CHUNK : chunk, bit = CAPPED ? t % CHUNK : row + half * 8;
      const uint64_t chosen = CAPPED ? selected[of] : kept;
      if (!(in.flags & STILL_NO_SALIENT) && (CAPPED ? (chosen >> bit & 1) != 0 : is_exact(row + half * 8))) {
        const int place = of * budget + __popcll(chosen & ((uint64_t(1) << bit) - 1));
        add_partial<NT * 16>(sums, half, in, b, kv, place, kind, col + threadIdx.x % 4 * 2);
      }
      T* to = to_rows.row(b, kv, t) + col;
      add_row(sums, half, to, [](float window) { return window; });
      __syncwarp();
      store_row(true, to, sums, half, 1.f);
    }
  }
};

template <class K, bool CAPPED>
__global__ void __launch_bounds__(256, K::P == 1 ? 2 : 1) absorbed_backward(const Backward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 16;
  using RowsTile = Tile<P, CHUNK, D>;
  using Square = Tile<P, D, D>;
  extern __shared__ unsigned char memory[];
  __shared__ RowHalves::Buffer exchange;
  const RowsTile values{aligned(memory)}, phis{values.base + RowsTile::BYTES};  // then df; then keys
  const Square weights{phis.base + RowsTile::BYTES}, d_s{weights.base + Square::BYTES};
  const AbsorbedBlock<T, CAPPED> at(in, threadIdx.x / 128 * (D / 2));
  const bool exact[2] = {at.is_exact(at.row), at.is_exact(at.row + 8)};
  const T* states = in.d_s + at.entry * 2 * D * D;
  const bool linear = CAPPED || at.budget < CHUNK;
  auto load_half = [&](int part, bool phi) {  // part 0: minus, in the second halves
    __syncthreads();
    const int offset = part ? 0 : D;
    load_matrix<256, D>(d_s, 0, states + offset * D, D);
    if (phi) load_matrix<256, CHUNK>(phis, 0, in.phi_k + at.first(in) * 2 * D + offset, 2 * D);
    copy_commit();
    copy_wait<0>();
    publish();
    __syncthreads();
  };

  float sums[NT][4];
  clear(sums);
  if (linear) {
    at.load(values, in.v);
    load_matrix<256, D>(weights, 0, in.w_k + int64_t(at.kv) * D * D, D);
    copy_commit();
#pragma unroll 1
    for (int part = 0; part < 2; part++) {
      load_half(part, true);
      add_tile_product_nn<KS>(sums, phis, d_s, at.col);
    }
  }
  at.leave(in, sums, in.d_v, 1);

  clear(sums);
  if (linear) {
    __syncthreads();
    at.load(phis, in.k);
    load_half(0, false);
    float f[NT][4], squared[2], inner[2], radial[2];
    squared_norms(phis, squared);
    clear(f);
    add_tile_product_nn<KS>(f, phis, weights, at.col);
    const float* z = in.d_z + at.entry * 2 * D + at.col + threadIdx.x % 4 * 2;
    RowHalves rows{exchange};
    np_map_backward(
        rows, f, squared, in.flags, [](const float (&)[NT][4], int) {},
        [&](float (&d)[NT][4], int part) {
          if (part) load_half(1, false);
          tile_product<KS>(d, values, 0, d_s, at.col);
          const float* zs = z + (part ? 0 : D);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            float2 x = read_pair(zs + n * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) d[n][e] = exact[e / 2] ? 0.f : d[n][e] + (e % 2 ? x.y : x.x);
          }
        },
        inner, radial);
    store_tile(values, at.row, at.col, f);
    publish();
    __syncthreads();
    tile_product<KS>(sums, values, 0, weights, at.col);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      store_row(true, in.df_k + (at.first(in) + at.row + half * 8) * D + at.col, f, half, 1.f);
      add_row(sums, half, in.k.row(at.b, at.kv, at.token_of(at.row + half * 8)) + at.col, [&](float k) { return radial[half] * k; });
    }
  }
  at.leave(in, sums, in.d_k, 0);
}

int step_absorbed(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) -> int {
    using K = decltype(kind);
    Backward<typename K::T> in(shape, args, args.host_budgets);
    if (in.chunks < 3) return cudaSuccess;
    constexpr int bytes = 2 * Tile<K::P, CHUNK, K::D>::BYTES + 2 * Tile<K::P, K::D, K::D>::BYTES + ALIGNMENT;
    return launch(args.routing.cap == STILL_NO_CAP ? absorbed_backward<K, false> : absorbed_backward<K, true>, dim3(in.chunks - 2, shape.kv_heads, shape.batch), 256, bytes, stream, in);
  });
}

}  // namespace still
