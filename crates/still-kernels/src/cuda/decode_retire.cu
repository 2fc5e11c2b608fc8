// Before the first token of a chunk is answered, the chunk two before leaves the ring: its salient rows go to the store, the
// others into the state. Under a cap `decode_admit` has been there: the store has what it keeps, the ring the rest. At every other
// step the blocks return at once. A block owns 64 features of one (sequence, KV head).
#include "channel_codes.cuh"
#include "decode.cuh"
#include "np_map.cuh"
#include "ranked.cuh"
#include "wgmma.cuh"

namespace still {

// Whether phi takes the weights' place: shared memory has no room for both.
template <class K>
constexpr bool IN_PLACE = K::D > 128;

// A retiring chunk of a (sequence, KV head).
struct Retiring {
  int b, kv, chunk, budget;
  int64_t bk, from;  // its first row of the rings

  template <class T>
  __device__ __forceinline__ Retiring(const Decode<T>& in, int position)
      : b(blockIdx.z), kv(blockIdx.y), chunk(position / CHUNK - 2), budget(in.budgets[kv]), bk(int64_t(b) * in.kv_heads + kv),
        from(bk * RING + chunk % 2 * CHUNK) {}
};

// Whether a thread's token is among the chunk's `budget` best by the scores in the ring: two words, in `words`. A barrier is to come
// before they are read.
template <class T>
__device__ __forceinline__ void select_salient(const Decode<T>& in, const Retiring& at, float* scores, uint32_t* words) {
  const float mine = threadIdx.x < CHUNK ? sound(in.retiring_score(in.ring_score[at.from + threadIdx.x], threadIdx.x)) : 0.f;
  if (threadIdx.x < CHUNK) scores[threadIdx.x] = mine;
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < CHUNK; j++) rank += scores[j] > mine || (scores[j] == mine && j < threadIdx.x);
  const uint32_t word = __ballot_sync(0xffffffffu, rank < at.budget);
  if (threadIdx.x < CHUNK && threadIdx.x % 32 == 0) words[threadIdx.x / 32] = word;
}

// How many of the chunk's kept rows come before one of them.
__device__ __forceinline__ int place_of(uint64_t kept, int row) { return __popcll(kept & ((uint64_t(1) << row) - 1)); }

// The kept rows to a store of codes, a warp each, or keys a channel a thread; the blocks take turns.
template <int D, class T>
__device__ __forceinline__ void store_codes(const Stored<T>& in, const Retiring& at, uint64_t kept) {
  const CodedRows stores[2] = {in.keys(D, at.kv), in.values(D)};
  const int64_t to = in.store(at.b, at.kv) + int64_t(at.chunk) * at.budget;
  const bool channels = by_channel(in.coding, D, in.cap, at.budget);
  if (channels)
    encode_keys(stores[0], to, CHUNK, blockIdx.x * 128 + threadIdx.x, gridDim.x * 128, [&](int t) { return in.ring_k + (at.from + t) * D; });
  for (int i = blockIdx.x * 4 + threadIdx.x / 32; i < 2 * CHUNK; i += gridDim.x * 4) {
    const int row = i / 2;
    if (!(kept >> row & 1) || (channels && i % 2 == 0)) continue;
    WarpRow<code_groups(D)> x;
    x.load((i % 2 ? in.ring_v : in.ring_k) + (at.from + row) * D, D);
    x.encode(stores[i % 2], to + place_of(kept, row));
  }
}

// The kept rows to the store as they are, sixteen bytes a thread at a time.
template <int D, class T>
__device__ __forceinline__ void store_rows(const Stored<T>& in, const Retiring& at, uint64_t kept) {
  constexpr int PIECES = D * sizeof(T) / 16;
  const int64_t to = in.store(at.b, at.kv) + int64_t(at.chunk) * at.budget;
  for (int i = threadIdx.x; i < CHUNK * PIECES; i += 128) {
    const int row = i / PIECES, piece = i % PIECES;
    if (!(kept >> row & 1)) continue;
    const int64_t target = (to + place_of(kept, row)) * PIECES + piece, source = (at.from + row) * PIECES + piece;
    reinterpret_cast<uint4*>(in.store_k)[target] = reinterpret_cast<const uint4*>(in.ring_k)[source];
    reinterpret_cast<uint4*>(in.store_v)[target] = reinterpret_cast<const uint4*>(in.ring_v)[source];
  }
}

// phi of the chunk's keys, zeros for those that are kept.
template <bool SAME_PLACE, int NT, class KEYS, class WEIGHTS, class PHI>
__device__ __forceinline__ void map_absorbed(KEYS keys, WEIGHTS weights, PHI phi, uint64_t kept, int flags) {
  constexpr int KS = NT / 2;
  const int warp = threadIdx.x / 32, row = warp * 16 + threadIdx.x % 32 / 4;
  Left<KEYS::P> x[KS];
#pragma unroll
  for (int i = 0; i < KS; i++) load_left(x[i], keys, warp * 16, i * 16);
  float squared[2], plus[NT][4], minus[NT][4];
  squared_norms(x, squared);
  clear(plus);
  add_product<KS>(plus, x, weights, 0);
  if (SAME_PLACE) __syncthreads();
  np_map(plus, minus, squared, flags);
  const float on[2] = {kept >> row & 1 ? 0.f : 1.f, kept >> (row + 8) & 1 ? 0.f : 1.f};
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      plus[n][e] *= on[e / 2];
      minus[n][e] *= on[e / 2];
    }
  store_tile(phi, row, 0, plus);
  store_tile(phi, row, NT * 8, minus);
}

// S += phi' V and z += the sum of phi's rows, for the block's 64 features from `slice` on.
template <int NT, class T, class PHI, class VALUES>
__device__ __forceinline__ void absorb(const Decode<T>& in, int64_t bk, int slice, PHI phi, VALUES values) {
  constexpr int D = NT * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, feature = slice + warp * 16 + lane / 4;
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
  Left<PHI::P> a[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    load_left_transposed(a[k], phi, k * 16, slice + warp * 16);
#pragma unroll
    for (int p = 0; p < PHI::P; p++) mma(z, a[k].r[p], 0x3f803f80u, 0x3f803f80u);
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

template <class K, bool EACH>
__global__ void __launch_bounds__(128) decode_retire(const Decode<typename K::T> state) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, NT = D / 8;
  using RowsTile = Tile<P, CHUNK, D>;
  let_next_begin();
  const int slice = blockIdx.x * 64, position = state.positions[blockIdx.z];
  wait_for_previous();
  if (!retires(position)) return;
  const Stored<T> in(state.template own<EACH>(blockIdx.z, D), EACH);
  extern __shared__ unsigned char memory[];
  __shared__ float scores[CHUNK];
  __shared__ uint32_t words[2];
  const RowsTile keys{aligned(memory)}, values{keys.base + RowsTile::BYTES};
  const Tile<P, D, D> weights{values.base + RowsTile::BYTES};
  const Tile<P, CHUNK, 2 * D> phi{IN_PLACE<K> ? weights.base : weights.base + weights.BYTES};
  const Retiring at(in, position);
  load_matrix<128, CHUNK>(keys, 0, in.ring_k + at.from * D, D);
  load_matrix<128, CHUNK>(values, 0, in.ring_v + at.from * D, D);
  load_matrix<128, D>(weights, 0, in.w_k + int64_t(at.kv) * D * D, D);
  copy_commit();

  select_salient(in, at, scores, words);
  copy_wait<0>();
  publish();
  __syncthreads();
  const bool capped = in.cap != STILL_NO_CAP;
  const uint64_t kept = capped ? in.admitted[at.bk] : uint64_t(words[1]) << 32 | words[0];
  if (in.coding != STILL_PLAIN && !capped) store_codes<D>(in, at, kept);
  if (slice == 0 && in.coding == STILL_PLAIN && !capped) store_rows<D>(in, at, kept);
  if (~kept == 0) return;

  map_absorbed<IN_PLACE<K>, NT>(keys, weights, phi, kept, in.flags);
  __syncthreads();
  if (2 * D % 64 != 0 && slice + int(threadIdx.x / 32) * 16 >= 2 * D) return;  // the last slice may have fewer than 64
  absorb<NT>(in, at.bk, slice, phi, values);
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
