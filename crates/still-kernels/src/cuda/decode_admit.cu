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
  const int chunk = position / CHUNK - 2, budget = in.budgets[kv];
  const int before = kept_tokens(in.cap, budget, chunk), after = kept_tokens(in.cap, budget, chunk + 1);
  const int64_t bk = int64_t(b) * in.kv_heads + kv, ring = bk * RING + chunk % 2 * CHUNK, store = in.store(b, kv);

  if (t < CHUNK) unranked[t] = {sound(in.retiring_score(in.ring_score[ring + t], t)), chunk * CHUNK + t};
  __syncthreads();
  if (t < CHUNK) {
    int rank = 0;
    for (int i = 0; i < CHUNK; i++) rank += is_before(unranked[i], unranked[t]);
    arrivals[rank] = unranked[t];
  }
  __syncthreads();

  // The lowest of stored and arriving tokens go, one by one. `last`: the lowest of the stored that has gone.
  int entering = budget, gone = 0;
  Ranked last{-INFINITY, INT32_MAX};
  Candidate candidate{{0.f, 0}, -1};
  bool known = false;
  while (before - gone + entering > after) {
    if (!known) {
      candidate.at = -1;
      for (int i = t; i < before; i += ADMIT_THREADS) {
        const Candidate x{{sound(in.store_score[store + i]), in.store_token[store + i]}, i};
        if (is_before(x.token, last)) candidate = lower(candidate, x);
      }
      for (int i = 16; i > 0; i /= 2)
        candidate = lower(candidate, {{__shfl_xor_sync(0xffffffffu, candidate.token.score, i), __shfl_xor_sync(0xffffffffu, candidate.token.token, i)},
                                      __shfl_xor_sync(0xffffffffu, candidate.at, i)});
      if (t % 32 == 0) lowest[t / 32] = candidate;
      __syncthreads();
      candidate = lowest[0];
      for (int i = 1; i < ADMIT_THREADS / 32; i++) candidate = lower(candidate, lowest[i]);
      __syncthreads();  // before they are written again
      known = true;
    }
    if (entering > 0 && (candidate.at < 0 || is_before(candidate.token, arrivals[entering - 1]))) {
      entering--;
    } else {
      if (t == 0) leaving[gone] = candidate.at;
      last = candidate.token;
      gone++;
      known = false;
    }
  }
  __syncthreads();

  uint64_t free_rows = 0;
  for (int i = gone; i < entering; i++) free_rows |= uint64_t(1) << (arrivals[i].token % CHUNK);
  if (t == 0) in.admitted[bk] = free_rows;
  if (in.coding != STILL_PLAIN) {
    const CodedRows stores[2] = {in.keys(d, kv), in.values(d)};
    for (int i = t / 32; i < 2 * entering; i += ADMIT_THREADS / 32) {
      const int entry = i / 2;
      const bool trade = entry < gone;
      const int64_t to = store + (trade ? leaving[entry] : before + entry - gone);
      T* const row = (i % 2 ? in.ring_v : in.ring_k) + (ring + arrivals[entry].token % CHUNK) * d;
      WarpRow<> enters, leaves;
      enters.load(row, d);
      if (trade) leaves.decode(stores[i % 2], to);
      __syncwarp();
      enters.encode(stores[i % 2], to);
      if (trade) leaves.store(row, d);
    }
  }
  const int pieces = d * int(sizeof(T)) / 16;
  for (int i = t; in.coding == STILL_PLAIN && i < entering * pieces; i += ADMIT_THREADS) {
    const int entry = i / pieces, piece = i % pieces;
    const bool trade = entry < gone;
    const int64_t from = (ring + arrivals[entry].token % CHUNK) * pieces + piece;
    const int64_t to = (store + (trade ? leaving[entry] : before + entry - gone)) * pieces + piece;
    auto move = [&](T* ring_rows, T* store_rows) {
      uint4 *a = reinterpret_cast<uint4*>(ring_rows) + from, *c = reinterpret_cast<uint4*>(store_rows) + to, enters = *a;
      if (trade) *a = *c;
      *c = enters;
    };
    move(in.ring_k, in.store_k);
    move(in.ring_v, in.store_v);
  }
  if (t < entering) {
    const int64_t to = store + (t < gone ? leaving[t] : before + t - gone);
    in.store_score[to] = arrivals[t].score;
    in.store_token[to] = arrivals[t].token;
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
