// Under a cap, before a chunk retires: which of its tokens enter the store and which stored ones leave it. A row that leaves and
// one that enters change places, so that what is absorbed lies in the chunk's rows of the ring, whose time is over. `admitted`
// names the rows of the ring that took a place that was free: nothing of them is absorbed. A block has one (sequence, KV head).
#include "decode.cuh"
#include "ranked.cuh"

namespace still {

constexpr int ADMIT_THREADS = 256;

// A token and where it lies in the store; none if `at` is negative.
struct Candidate {
  Ranked token;
  int at;
};

// Which of two is ranked lower.
__device__ __forceinline__ Candidate lower(Candidate a, Candidate b) {
  if (a.at < 0) return b;
  return b.at < 0 || is_before(b.token, a.token) ? a : b;
}

// The chunk that retires and the store that it meets. `before`, `after`: tokens that the store keeps then.
struct Admission {
  int chunk, budget, before, after;
  int64_t ring, store;  // where the chunk and the store begin, in rows

  template <class T>
  __device__ __forceinline__ Admission(const Stored<T>& in, int b, int kv, int position)
      : chunk(position / CHUNK - 2), budget(in.budgets[kv]), before(kept_tokens(in.cap, budget, chunk)),
        after(kept_tokens(in.cap, budget, chunk + 1)), ring((int64_t(b) * in.kv_heads + kv) * RING + chunk % 2 * CHUNK), store(in.store(b, kv)) {}
};

// The chunk's tokens by rank. `unranked` is scratch; a barrier is at the end.
template <class T>
__device__ __forceinline__ void rank_arrivals(const Stored<T>& in, const Admission& at, Ranked* unranked, Ranked* arrivals) {
  const int t = threadIdx.x;
  if (t < CHUNK) unranked[t] = {sound(in.retiring_score(in.ring_score[at.ring + t], t)), at.chunk * CHUNK + t};
  __syncthreads();
  if (t < CHUNK) {
    int rank = 0;
    for (int i = 0; i < CHUNK; i++) rank += is_before(unranked[i], unranked[t]);
    arrivals[rank] = unranked[t];
  }
  __syncthreads();
}

// The lowest of the stored tokens that are ranked above `last`, for all threads. `lowest` is scratch, one for each warp.
template <class T>
__device__ __forceinline__ Candidate lowest_stored(const Stored<T>& in, const Admission& at, Ranked last, Candidate* lowest) {
  Candidate candidate{{0.f, 0}, -1};
  for (int i = threadIdx.x; i < at.before; i += ADMIT_THREADS) {
    const Candidate x{{sound(in.store_score[at.store + i]), in.store_token[at.store + i]}, i};
    if (is_before(x.token, last)) candidate = lower(candidate, x);
  }
  for (int i = 16; i > 0; i /= 2)
    candidate = lower(candidate, {{__shfl_xor_sync(0xffffffffu, candidate.token.score, i), __shfl_xor_sync(0xffffffffu, candidate.token.token, i)},
                                  __shfl_xor_sync(0xffffffffu, candidate.at, i)});
  if (threadIdx.x % 32 == 0) lowest[threadIdx.x / 32] = candidate;
  __syncthreads();
  candidate = lowest[0];
  for (int i = 1; i < ADMIT_THREADS / 32; i++) candidate = lower(candidate, lowest[i]);
  __syncthreads();  // before they are written again
  return candidate;
}

// How many of the arrivals enter, and how many of the stored go, whose places come to `leaving`: the lowest of both go, one by one,
// until the others fit. A barrier is at the end.
template <class T>
__device__ __forceinline__ int2 choose(const Stored<T>& in, const Admission& at, const Ranked* arrivals, Candidate* lowest, int* leaving) {
  int entering = at.budget, gone = 0;
  Ranked last{-INFINITY, INT32_MAX};  // the lowest of the stored that has gone
  Candidate candidate{{0.f, 0}, -1};
  bool known = false;
  while (at.before - gone + entering > at.after) {
    if (!known) {
      candidate = lowest_stored(in, at, last, lowest);
      known = true;
    }
    if (entering > 0 && (candidate.at < 0 || is_before(candidate.token, arrivals[entering - 1]))) {
      entering--;
    } else {
      if (threadIdx.x == 0) leaving[gone] = candidate.at;
      last = candidate.token;
      gone++;
      known = false;
    }
  }
  __syncthreads();
  return make_int2(entering, gone);
}

// What an arrival takes: the place of one that leaves (`trade`), or the next free one.
struct Places {
  const Admission& at;
  const int* leaving;
  int gone;
  __device__ __forceinline__ bool trade(int entry) const { return entry < gone; }
  __device__ __forceinline__ int64_t of(int entry) const { return at.store + (trade(entry) ? leaving[entry] : at.before + entry - gone); }
};

// Rows of codes change places with rows of the ring, a warp each.
template <class T>
__device__ __forceinline__ void trade_codes(const Stored<T>& in, const Admission& at, const Ranked* arrivals, int entering, const Places& places,
                                            int kv, int d) {
  const CodedRows stores[2] = {in.keys(d, kv), in.values(d)};
  for (int i = threadIdx.x / 32; i < 2 * entering; i += ADMIT_THREADS / 32) {
    const int entry = i / 2;
    const bool trade = places.trade(entry);
    const int64_t to = places.of(entry);
    T* const row = (i % 2 ? in.ring_v : in.ring_k) + (at.ring + arrivals[entry].token % CHUNK) * d;
    WarpRow<> enters, leaves;
    enters.load(row, d);
    if (trade) leaves.decode(stores[i % 2], to);
    __syncwarp();
    enters.encode(stores[i % 2], to);
    if (trade) leaves.store(row, d);
  }
}

// Rows as they are change places, sixteen bytes a thread at a time.
template <class T>
__device__ __forceinline__ void trade_rows(const Stored<T>& in, const Admission& at, const Ranked* arrivals, int entering, const Places& places,
                                           int d) {
  const int pieces = d * int(sizeof(T)) / 16;
#pragma unroll 1
  for (int i = threadIdx.x; i < entering * pieces; i += ADMIT_THREADS) {
    const int entry = i / pieces, piece = i % pieces;
    const bool trade = places.trade(entry);
    const int64_t from = (at.ring + arrivals[entry].token % CHUNK) * pieces + piece, to = places.of(entry) * pieces + piece;
    auto move = [&](T* ring_rows, T* store_rows) {
      uint4 *a = reinterpret_cast<uint4*>(ring_rows) + from, *c = reinterpret_cast<uint4*>(store_rows) + to, enters = *a;
      if (trade) *a = *c;
      *c = enters;
    };
    move(in.ring_k, in.store_k);
    move(in.ring_v, in.store_v);
  }
}

template <class T, bool EACH>
__global__ void __launch_bounds__(ADMIT_THREADS) decode_admit(const Decode<T> state, int d) {
  let_next_begin();
  const int kv = blockIdx.x, b = blockIdx.y, position = state.positions[b], t = threadIdx.x;
  wait_for_previous();
  if (!retires(position)) return;
  const Stored<T> in(state.template own<EACH>(b, d), EACH);
  __shared__ Ranked unranked[CHUNK], arrivals[CHUNK];
  __shared__ Candidate lowest[ADMIT_THREADS / 32];
  __shared__ int leaving[CHUNK];  // places in the store
  const Admission at(in, b, kv, position);
  rank_arrivals(in, at, unranked, arrivals);
  const int2 chosen = choose(in, at, arrivals, lowest, leaving);
  const int entering = chosen.x, gone = chosen.y;

  uint64_t free_rows = 0;
  for (int i = gone; i < entering; i++) free_rows |= uint64_t(1) << (arrivals[i].token % CHUNK);
  if (t == 0) in.admitted[int64_t(b) * in.kv_heads + kv] = free_rows;
  const Places places{at, leaving, gone};
  if (in.coding != STILL_PLAIN) trade_codes(in, at, arrivals, entering, places, kv, d);
  else trade_rows(in, at, arrivals, entering, places, d);
  if (t < entering) {
    in.store_score[places.of(t)] = arrivals[t].score;
    in.store_token[places.of(t)] = arrivals[t].token;
  }
}

int run_decode_admit(const StillShape& shape, const StillDecode& args, StillStream stream) {
  return dispatch_forward(shape, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return launch_early(args.states ? decode_admit<T, true> : decode_admit<T, false>, dim3(shape.kv_heads, shape.batch), ADMIT_THREADS, 0, stream,
                  Decode<T>(shape, args), int(shape.head_dim));
  });
}

}  // namespace still
