// Which salient tokens remain under a cap. Retirements come one after the other, so one block walks the chunks of a (sequence, KV
// head), the salient set by rank: what arrives is ranked too, and a token's place in both together is its own plus the number of
// others before it. The set lies in shared memory; a larger one is what the chunk before sees, with its scores looked up.
#include "ranked.cuh"

namespace still {

constexpr int DEMOTE_THREADS = 256, MOST_SHARED = 8192;

// Those that are left take the places of what did not leave when they, or as many others, came. `kept(rank)`: a token that is left.
template <class Kept>
__device__ __forceinline__ void place_kept(Kept kept, int cap, int budget, int retired, int tokens, uint32_t* absorbed_at, int32_t* order) {
  for (int i = threadIdx.x; i < kept_tokens(cap, budget, retired); i += DEMOTE_THREADS) {
    const int chunk = i / budget, before = kept_tokens(cap, budget, chunk), after = kept_tokens(cap, budget, chunk + 1);
    const int token = kept(i);
    order[chunk * CHUNK + CHUNK - (after - before) + i - before] = ~token;
    absorbed_at[token] = UINT32_MAX;
  }
  for (int i = retired * CHUNK + threadIdx.x; i < tokens; i += DEMOTE_THREADS) absorbed_at[i] = UINT32_MAX;
}

// Tokens of a retiring chunk that were not selected come first among those that are absorbed.
__device__ __forceinline__ void absorb_unselected(uint64_t chosen, int chunk, int32_t* entered, uint32_t* absorbed_at) {
  const int t = threadIdx.x;
  if (t >= CHUNK || (chosen >> t & 1)) return;
  entered[__popcll(~chosen & ((uint64_t(1) << t) - 1))] = chunk * CHUNK + t;
  if (absorbed_at) absorbed_at[chunk * CHUNK + t] = chunk + 2;
}

template <bool SHARED>
__global__ void __launch_bounds__(DEMOTE_THREADS) demote(const float* score, const int32_t* budgets, const uint64_t* selected,
                                                         const int32_t* salient, int cap, uint32_t* absorbed_at, int32_t* visible,
                                                         int32_t* order, const StillPast past, int tokens, int chunks, int retired) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Ranked unranked[CHUNK], arrivals[CHUNK];
  Ranked *old = reinterpret_cast<Ranked*>(memory), *next = old + cap;  // SHARED
  const int64_t row = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int budget = budgets[blockIdx.x], t = threadIdx.x;
  // What a state had stored is ranked already. It has the negative numbers, in order, so that of equals it is the earlier.
  const int retired_before = past.retired ? past.retired[blockIdx.y] : 0, stored = kept_tokens(cap, budget, retired_before);
  score += row * tokens;
  salient += row * (tokens + past.stored) + stored;
  if (absorbed_at) absorbed_at += row * tokens;
  selected += row * chunks;
  visible += row * chunks * cap;
  order += row * retired * CHUNK;

  for (int i = t; i < stored; i += DEMOTE_THREADS) {
    if (SHARED) old[i] = {sound(past.stored_score[row * past.stored + i]), i - stored};
    for (int chunk = 0; chunk < min(chunks, 2); chunk++) visible[int64_t(chunk) * cap + i] = i - stored;
  }
  // The next chunk's come from memory meanwhile.
  auto fetch = [&](int chunk) -> Ranked {
    if (t >= budget || chunk >= retired) return {0.f, 0};
    const int token = salient[chunk * budget + t];
    return {sound(score[token]), token};
  };
  // What is kept when a chunk retires, by rank.
  auto kept = [&](int chunk, int rank) -> Ranked {
    if (SHARED) return old[rank];
    const int token = visible[int64_t(chunk + 1) * cap + rank];
    return {sound(token < 0 ? past.stored_score[row * past.stored + stored + token] : score[token]), token};
  };
  Ranked coming = fetch(0);
  for (int chunk = 0; chunk < retired; chunk++) {
    const int before = kept_tokens(cap, budget, retired_before + chunk), after = kept_tokens(cap, budget, retired_before + chunk + 1);
    const Ranked mine = coming;
    if (t < budget) unranked[t] = mine;
    coming = fetch(chunk + 1);
    __syncthreads();
    if (t < budget) {
      int rank = 0;
      for (int i = 0; i < budget; i++) rank += is_before(unranked[i], mine);
      arrivals[rank] = mine;
    }
    __syncthreads();
    int32_t *entered = order + chunk * CHUNK, *seen = visible + int64_t(chunk + 2) * cap;
    auto place = [&](Ranked x, int rank) {
      if (rank < after) {
        if (SHARED) next[rank] = x;
        seen[rank] = x.token;
      } else {  // behind the tokens that were not selected at all
        entered[CHUNK - budget + rank - after] = x.token;
        if (absorbed_at) absorbed_at[x.token] = chunk + 2;
      }
    };
    for (int i = t; i < before; i += DEMOTE_THREADS) {
      const Ranked own = kept(chunk, i);
      place(own, i + count_before(arrivals, budget, own));
    }
    if (t < budget) place(arrivals[t], t + count_before_of([&](int rank) { return kept(chunk, rank); }, before, arrivals[t]));
    absorb_unselected(selected[chunk], chunk, entered, absorbed_at);
    if (past.retired && t < after - before) entered[CHUNK - (after - before) + t] = NO_TOKEN;
    Ranked* other = old;
    old = next;
    next = other;
    __syncthreads();
  }
  if (past.retired) return;
  place_kept([&](int rank) { return kept(retired, rank).token; }, cap, budget, retired, tokens, absorbed_at, order);
}

}  // namespace still

extern "C" int still_demote(const StillShape* shape, const float* score, const int32_t* budgets, const uint64_t* selected,
                            const int32_t* salient, int32_t cap, uint32_t* absorbed_at, int32_t* visible, int32_t* order,
                            const StillPast* past, StillStream stream) {
  if (!still::valid(*shape) || cap < 1) return cudaErrorInvalidValue;
  const bool shared = cap <= still::MOST_SHARED;
  return still::launch(shared ? still::demote<true> : still::demote<false>, dim3(shape->kv_heads, shape->batch), still::DEMOTE_THREADS,
                       shared ? 2 * cap * int(sizeof(still::Ranked)) : 0, stream, score, budgets, selected, salient, int(cap), absorbed_at,
                       visible, order, past ? *past : StillPast{}, int(shape->tokens), still::chunks(*shape), still::retired(*shape));
}
