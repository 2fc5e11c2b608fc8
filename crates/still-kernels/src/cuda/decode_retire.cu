// Before the first token of a chunk is answered, the chunk two before leaves the ring: its salient rows go to the store, the
// others into the state. Under a cap `decode_admit` has been there: the store has what it keeps, the ring the rest. At every other step the blocks return at once. A block owns 64 features of one (sequence, KV head).
#include "channel_codes.cuh"
#include "decode.cuh"
#include "np_map.cuh"
#include "ranked.cuh"
#include "wgmma.cuh"

namespace still {

// Whether phi takes the weights' place: shared memory has no room for both.
template <class K>
constexpr bool IN_PLACE = K::D > 128;

template <class K, bool EACH>
__global__ void __launch_bounds__(128) decode_retire(const Decode<typename K::T> state) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using RowsTile = Tile<P, CHUNK, D>;
  let_next_begin();
  const int slice = blockIdx.x * 64, kv = blockIdx.y, b = blockIdx.z, position = state.positions[b];
  wait_for_previous();
  if (!retires(position)) return;
  const Stored<T> in(state.template own<EACH>(b, D), EACH);
  extern __shared__ unsigned char memory[];
  __shared__ float scores[CHUNK];
  __shared__ uint32_t words[2];
  const RowsTile keys{aligned(memory)}, values{keys.base + RowsTile::BYTES};
  const Tile<P, D, D> weights{values.base + RowsTile::BYTES};
  const Tile<P, CHUNK, 2 * D> phi{IN_PLACE<K> ? weights.base : weights.base + weights.BYTES};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = position / CHUNK - 2, budget = in.budgets[kv];
  const int64_t bk = int64_t(b) * in.kv_heads + kv, from = bk * RING + chunk % 2 * CHUNK;
  load_matrix<128, CHUNK>(keys, 0, in.ring_k + from * D, D);
  load_matrix<128, CHUNK>(values, 0, in.ring_v + from * D, D);
  load_matrix<128, D>(weights, 0, in.w_k + int64_t(kv) * D * D, D);
  copy_commit();

  float mine = threadIdx.x < CHUNK ? sound(in.retiring_score(in.ring_score[from + threadIdx.x], threadIdx.x)) : 0.f;
  if (threadIdx.x < CHUNK) scores[threadIdx.x] = mine;
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < CHUNK; j++) rank += scores[j] > mine || (scores[j] == mine && j < threadIdx.x);
  uint32_t word = __ballot_sync(0xffffffffu, rank < budget);
  if (threadIdx.x < CHUNK && lane == 0) words[warp] = word;
  copy_wait<0>();
  publish();
  __syncthreads();
  const bool capped = in.cap != STILL_NO_CAP;
  const uint64_t kept = capped ? in.admitted[bk] : uint64_t(words[1]) << 32 | words[0];

  if (in.coding != STILL_PLAIN && !capped) {  // the blocks take turns
    const CodedRows stores[2] = {in.keys(D, kv), in.values(D)};
    const int64_t to = in.store(b, kv) + int64_t(chunk) * budget;
    const bool channels = by_channel(in.coding, D, in.cap, budget);
    if (channels)
      encode_keys(stores[0], to, CHUNK, blockIdx.x * 128 + threadIdx.x, gridDim.x * 128, [&](int t) { return in.ring_k + (from + t) * D; });
    for (int i = blockIdx.x * 4 + warp; i < 2 * CHUNK; i += gridDim.x * 4) {
      const int row = i / 2;
      if (!(kept >> row & 1) || (channels && i % 2 == 0)) continue;
      WarpRow<code_groups(D)> x;
      x.load((i % 2 ? in.ring_v : in.ring_k) + (from + row) * D, D);
      x.encode(stores[i % 2], to + __popcll(kept & ((uint64_t(1) << row) - 1)));
    }
  }
  if (slice == 0 && in.coding == STILL_PLAIN && !capped) {
    constexpr int PIECES = D * sizeof(T) / 16;
    const int64_t to = in.store(b, kv) + int64_t(chunk) * budget;
    for (int i = threadIdx.x; i < CHUNK * PIECES; i += 128) {
      const int row = i / PIECES, piece = i % PIECES;
      if (!(kept >> row & 1)) continue;
      const int64_t target = (to + __popcll(kept & ((uint64_t(1) << row) - 1))) * PIECES + piece, source = (from + row) * PIECES + piece;
      reinterpret_cast<uint4*>(in.store_k)[target] = reinterpret_cast<const uint4*>(in.ring_k)[source];
      reinterpret_cast<uint4*>(in.store_v)[target] = reinterpret_cast<const uint4*>(in.ring_v)[source];
    }
  }
  if (~kept == 0) return;

  {
    Left<P> x[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(x[i], keys, warp * 16, i * 16);
    float squared[2], plus[NT][4], minus[NT][4];
    squared_norms(x, squared);
    clear(plus);
    add_product<KS>(plus, x, weights, 0);
    if (IN_PLACE<K>) __syncthreads();
    np_map(plus, minus, squared, in.flags);
    const int row = warp * 16 + lane / 4;
    const float on[2] = {kept >> row & 1 ? 0.f : 1.f, kept >> (row + 8) & 1 ? 0.f : 1.f};
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        plus[n][e] *= on[e / 2];
        minus[n][e] *= on[e / 2];
      }
    store_tile(phi, row, 0, plus);
    store_tile(phi, row, D, minus);
  }
  __syncthreads();
  if (2 * D % 64 != 0 && slice + warp * 16 >= 2 * D) return;  // the last slice may have fewer than 64
  const int feature = slice + warp * 16 + lane / 4;
  float sum[NT][4], z[4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = bk * 2 * D + feature + half * 8;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float2 x = read_pair(in.s + at * D + n * 8 + lane % 4 * 2);
      sum[n][half * 2] = x.x;
      sum[n][half * 2 + 1] = x.y;
    }
    z[half * 2] = z[half * 2 + 1] = in.z[at];
  }
  Left<P> a[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    load_left_transposed(a[k], phi, k * 16, slice + warp * 16);
#pragma unroll
    for (int p = 0; p < P; p++) mma(z, a[k].r[p], 0x3f803f80u, 0x3f803f80u);
  }
  product_nn<4, NT>(sum, a, values, 0);
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = bk * 2 * D + feature + half * 8;
    store_row(true, in.s + at * D, sum, half, 1.f);
    if (lane % 4 == 0) in.z[at] = z[half * 2];
  }
}

int run_decode_retire(const StillShape& shape, const StillDecode& args, StillStream stream) {
  return dispatch_forward(shape, [&](auto kind) {
    using K = decltype(kind);
    using Phi = Tile<K::P, CHUNK, 2 * K::D>;
    using Weights = Tile<K::P, K::D, K::D>;
    static_assert(!IN_PLACE<K> || Phi::BYTES <= Weights::BYTES);
    constexpr int bytes = 2 * Tile<K::P, CHUNK, K::D>::BYTES + Weights::BYTES + (IN_PLACE<K> ? 0 : Phi::BYTES) + ALIGNMENT;
    return launch_early(args.states ? decode_retire<K, true> : decode_retire<K, false>, dim3((2 * K::D + 63) / 64, shape.kv_heads, shape.batch), 128, bytes,
                  stream, Decode<typename K::T>(shape, args));
  });
}

}  // namespace still
