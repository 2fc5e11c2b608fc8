// Reading onto a state: the tokens of its ring and the new ones become one sequence, which begins with a chunk; what was stored
// lies before it, and the state's sums are the first of the prefix states. The kernels of whole sequences do the rest.
#include "channel_codes.cuh"
#include "decode.cuh"
#include "ranked.cuh"

namespace still {

constexpr int PAST_THREADS = 128, RANK_THREADS = 256;

template <class T>
struct PastRows {
  Rows<T> q, k, v;
};

// The stored rows of a head by rank: how many others come before each.
template <class T>
__global__ void __launch_bounds__(RANK_THREADS) rank_stored(const Decode<T> given, const StillPast past) {
  const Stored<T> state(given);
  __shared__ Ranked others[RANK_THREADS];
  const int kv = blockIdx.y, b = blockIdx.z, place = blockIdx.x * RANK_THREADS + threadIdx.x;
  const int stored = kept_tokens(state.cap, state.budgets[kv], past.retired[b]);
  if (int(blockIdx.x) * RANK_THREADS >= stored) return;
  const int64_t row = (int64_t(b) * state.kv_heads + kv) * past.stored, from = state.store(b, kv);
  auto at = [&](int i) { return Ranked{state.store_score[from + i], state.store_token[from + i]}; };
  auto ranked = [](Ranked x) { return Ranked{sound(x.score), x.token}; };
  const Ranked mine = place < stored ? at(place) : Ranked{0.f, 0};
  int rank = 0;
  for (int first = 0; first < stored; first += RANK_THREADS) {
    const int count = min(RANK_THREADS, stored - first);
    __syncthreads();
    if (int(threadIdx.x) < count) others[threadIdx.x] = ranked(at(first + threadIdx.x));
    __syncthreads();
    for (int i = 0; i < count; i++) rank += is_before(others[i], ranked(mine));
  }
  if (place >= stored) return;
  past.stored_score[row + rank] = mine.score;
  past.stored_token[row + rank] = mine.token;
  past.stored_place[row + rank] = place;
}

// The rows of one head of queries, keys or values, sixteen bytes a thread at a time.
template <class T>
__global__ void __launch_bounds__(PAST_THREADS) past_rows(const Decode<T> given, const StillPast past, const PastRows<T> to, int tokens, int d) {
  const Stored<T> state(given);
  const int b = blockIdx.z, all = past.tokens[b], ring = past.ring[b], retired = past.retired[b];
  const bool is_query = int(blockIdx.y) < state.heads, is_value = int(blockIdx.y) >= state.heads + state.kv_heads;
  const int head = is_query ? blockIdx.y : (blockIdx.y - state.heads) % state.kv_heads;
  const int64_t bk = int64_t(b) * state.kv_heads + head;
  const int stored = is_query || state.coding != STILL_PLAIN ? 0 : kept_tokens(state.cap, state.budgets[head], retired);
  const Rows<const T> fresh = is_query ? state.q : is_value ? state.v : state.k;
  const Rows<T> out = is_query ? to.q : is_value ? to.v : to.k;
  const T *ring_rows = is_value ? state.ring_v : state.ring_k, *store_rows = is_value ? state.store_v : state.store_k;
  const int pieces = d * int(sizeof(T)) / 16;
  auto row_of = [&](int t) -> const T* {
    if (t >= ring) return t < all ? fresh.row(b, head, t - ring) : nullptr;
    if (is_query) return nullptr;
    if (t >= 0) return ring_rows + (bk * RING + (t + retired * CHUNK) % RING) * d;
    const int place = t + stored;
    return store_rows + (state.store(b, head) + (past.stored_place ? past.stored_place[bk * past.stored + place] : place)) * d;
  };
  // Several pieces are on their way at once.
  constexpr int AHEAD = 4;
  const int count = (stored + tokens) * pieces, step = gridDim.x * PAST_THREADS;
  for (int first = blockIdx.x * PAST_THREADS + threadIdx.x; first < count; first += AHEAD * step) {
    uint4 x[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = first + j * step;
      const T* from = i < count ? row_of(i / pieces - stored) : nullptr;
      x[j] = from ? reinterpret_cast<const uint4*>(from)[i % pieces] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int i = first + j * step;
      if (i < count) reinterpret_cast<uint4*>(out.row(b, head, i / pieces - stored))[i % pieces] = x[j];
    }
  }
}

// `past_rounded` of keys that are coded by channel: a thread has a channel of 32. The last tokens, fewer than 32, are not in chunks that
// are retired.
template <class T>
__device__ __forceinline__ void round_channels(const CodedRows& store, int64_t first, int stored, const Rows<T>& out, int rounded, int tokens) {
  const int b = blockIdx.z, kv = blockIdx.y / 2, d = store.d;
  for (int i = blockIdx.x * PAST_THREADS + threadIdx.x; i < (stored + tokens) / CODE_GROUP * d; i += gridDim.x * PAST_THREADS) {
    const int place = i / d * CODE_GROUP, channel = i % d, t = place - stored;
    KeyChannel keys;
    if (t < 0) {
      keys.decode(store, first + place, channel);
    } else {
      keys.load([&](int j) { return out.row(b, kv, t + j)[channel]; });
      keys.encode(store, -1, channel);
    }
#pragma unroll
    for (int j = 0; j < CODE_GROUP; j++) out.row(b, kv, t + rounded + j)[channel] = T(keys.x[j]);
  }
}

// Behind the rows of one head of keys or values: what was stored and what storing will leave of the others. A warp has a row.
template <class T>
__global__ void __launch_bounds__(PAST_THREADS) past_rounded(const Decode<T> given, const StillPast past, const PastRows<T> to, int rounded,
                                                             int tokens, int d) {
  const Stored<T> state(given);
  const int kv = blockIdx.y / 2, b = blockIdx.z, warps = PAST_THREADS / 32;
  const bool is_value = blockIdx.y % 2;
  const int64_t bk = int64_t(b) * state.kv_heads + kv;
  const int stored = kept_tokens(state.cap, state.budgets[kv], past.retired[b]);
  const Rows<T> out = is_value ? to.v : to.k;
  const CodedRows store = is_value ? state.values(d) : state.keys(d, kv);
  if (!is_value && by_channel(state.coding, d, state.cap, state.budgets[kv]))
    return round_channels(store, state.store(b, kv), stored, out, rounded, tokens);
  for (int t = int(blockIdx.x) * warps + threadIdx.x / 32 - stored; t < tokens; t += gridDim.x * warps) {
    WarpRow<> x;
    if (t < 0) {
      const int place = t + stored;
      x.decode(store, state.store(b, kv) + (past.stored_place ? past.stored_place[bk * past.stored + place] : place));
    } else {
      x.load(out.row(b, kv, t), d);
      x.encode(store, -1);
    }
    x.store(out.row(b, kv, t + rounded), d);
  }
}

// As `select`, a chunk a block.
template <class T>
__global__ void __launch_bounds__(CHUNK) past_select(const Decode<T> state, const StillPast past, float* score, uint64_t* selected,
                                                     int32_t* salient, int tokens) {
  __shared__ float scores[CHUNK];
  __shared__ uint32_t words[2];
  const int chunk = blockIdx.x, kv = blockIdx.y, b = blockIdx.z, t = threadIdx.x, token = chunk * CHUNK + t;
  const int64_t row = int64_t(b) * state.kv_heads + kv;
  const int budget = state.budgets[kv], retired = past.retired[b], stored = kept_tokens(state.cap, budget, retired);
  const bool whole = (chunk + 1) * CHUNK <= tokens;
  float own = 0.f;
  // What the ring's tokens received is in the scores already.
  const bool in_ring = token < past.ring[b] && state.router.kind != STILL_RECEIVED_ATTENTION;
  if (in_ring) score[row * tokens + token] = own = state.ring_score[row * RING + (token + retired * CHUNK) % RING];
  else if (whole) own = score[row * tokens + token];
  const float mine = sound(own);
  scores[t] = mine;
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < CHUNK; j++) rank += scores[j] > mine || (scores[j] == mine && j < t);
  const uint32_t word = __ballot_sync(0xffffffffu, whole && rank < budget);
  if (t % 32 == 0) words[t / 32] = word;
  __syncthreads();
  const uint64_t mask = uint64_t(words[1]) << 32 | words[0];
  if (t == 0) selected[row * gridDim.x + chunk] = mask;
  int32_t* list = salient + row * (past.stored + tokens);
  if (mask >> t & 1) list[stored + int64_t(chunk) * budget + __popcll(mask & ((uint64_t(1) << t) - 1))] = token;
  if (chunk == 0)
    for (int i = t; i < stored; i += CHUNK) list[i] = i - stored;
}

// What the last chunk sees to the store, where it is new there or has changed places; the rest to the ring.
template <class T>
__global__ void __launch_bounds__(PAST_THREADS) past_fill(const Decode<T> given, const StillPast past, Rows<const T> k, Rows<const T> v,
                                                          const float* score, const StillRouting routing, int tokens, int d) {
  const Stored<T> state(given);
  const int kv = blockIdx.y, b = blockIdx.z, all = past.tokens[b], first = past.retired[b], budget = state.budgets[kv];
  if (all == past.ring[b]) return;
  const int64_t row = int64_t(b) * state.kv_heads + kv;
  const int last = (all - 1) / CHUNK, leaving = max(last - 1, 0), chunks = (tokens + CHUNK - 1) / CHUNK;
  const int stored = kept_tokens(state.cap, budget, first), kept = kept_tokens(state.cap, budget, first + leaving);
  const int32_t* list = visible_list(routing, row, last, chunks, tokens);
  const int begin = routing.cap == STILL_NO_CAP ? stored : 0, window = leaving * CHUNK, pieces = d * int(sizeof(T)) / 16;
  const bool channels = by_channel(state.coding, d, state.cap, budget);
  if (channels)  // of tokens in order, from the first that was not stored
    encode_keys(state.keys(d, kv), state.store(b, kv) + stored, kept - stored, blockIdx.x * PAST_THREADS + threadIdx.x,
                gridDim.x * PAST_THREADS, [&](int t) { return k.row(b, kv, t); });
  for (int i = begin + blockIdx.x; i < kept + all - window; i += gridDim.x) {
    const bool store = i < kept;
    const int t = store ? list[i] : window + i - kept;
    const int64_t to = store ? state.store(b, kv) + i : row * RING + (t + first * CHUNK) % RING;
    if (store && state.coding != STILL_PLAIN) {
      const bool is_value = threadIdx.x / 32 % 2;
      const CodedRows rows = is_value ? state.values(d) : state.keys(d, kv);
      if (threadIdx.x >= 64 || (channels && !is_value)) {  // a warp for the key, one for the value
      } else if (t >= 0) {
        WarpRow<> x;
        x.load((is_value ? v : k).row(b, kv, t), d);
        x.encode(rows, to);
      } else {
        const CodedRows old(is_value ? past.stored_v : past.stored_k, state.all_entries, state.coding, d, !is_value);
        const int64_t from = state.store(b, kv) + past.stored_place[row * past.stored + stored + t];
        for (int x = threadIdx.x % 32; x < rows.bytes; x += 32) rows.row(to)[x] = old.row(from)[x];
        if (int(threadIdx.x % 32) < rows.count) rows.scales(to)[threadIdx.x % 32] = old.scales(from)[threadIdx.x % 32];
      }
    } else for (int piece = threadIdx.x; piece < pieces; piece += PAST_THREADS) {
      reinterpret_cast<uint4*>((store ? state.store_k : state.ring_k) + to * d)[piece] = reinterpret_cast<const uint4*>(k.row(b, kv, t))[piece];
      reinterpret_cast<uint4*>((store ? state.store_v : state.ring_v) + to * d)[piece] = reinterpret_cast<const uint4*>(v.row(b, kv, t))[piece];
    }
    if (threadIdx.x > 0) continue;
    if (!store) {
      state.ring_score[to] = ring_score(state.router, score[row * tokens + t], t, all, state.group);
    } else if (state.store_score) {
      const int64_t place = row * past.stored + stored + t;  // of a stored row
      state.store_score[to] = t < 0 ? past.stored_score[place] : score[row * tokens + t];
      state.store_token[to] = t < 0 ? past.stored_token[place] : first * CHUNK + t;
    }
  }
}

}  // namespace still

extern "C" int still_past_rows(const StillShape* shape, const StillPast* past, const StillDecode* state, StillRows q, StillRows k,
                               StillRows v, int32_t rounded, StillStream stream) {
  if ((state->coding != STILL_PLAIN) != (rounded > 0)) return cudaErrorInvalidValue;
  return still::dispatch_forward(*shape, [&](auto kind) -> int {
    using T = typename decltype(kind)::T;
    const still::Decode<T> from(*shape, *state);
    if (past->stored_place) {
      const int blocks = (past->stored + still::RANK_THREADS - 1) / still::RANK_THREADS;
      if (int error = still::launch(still::rank_stored<T>, dim3(blocks, shape->kv_heads, shape->batch), still::RANK_THREADS, 0, stream, from, *past))
        return error;
    }
    const still::PastRows<T> to{still::Rows<T>(q), still::Rows<T>(k), still::Rows<T>(v)};
    const int error = still::launch(still::past_rows<T>, dim3(64, shape->heads + 2 * shape->kv_heads, shape->batch), still::PAST_THREADS, 0, stream,
                                    from, *past, to, shape->tokens, shape->head_dim);
    if (error || rounded == 0) return error;
    return still::launch(still::past_rounded<T>, dim3(64, 2 * shape->kv_heads, shape->batch), still::PAST_THREADS, 0, stream, from, *past, to,
                         rounded, shape->tokens, shape->head_dim);
  });
}

extern "C" int still_past_select(const StillShape* shape, const StillPast* past, const StillDecode* state, float* score, uint64_t* selected,
                                 int32_t* salient, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return still::launch(still::past_select<T>, dim3(still::chunks(*shape), shape->kv_heads, shape->batch), still::CHUNK, 0, stream,
                         still::Decode<T>(*shape, *state), *past, score, selected, salient, shape->tokens);
  });
}

extern "C" int still_past_fill(const StillShape* shape, const StillPast* past, const StillDecode* state, StillRows k, StillRows v,
                               const float* score, const StillRouting* routing, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return still::launch(still::past_fill<T>, dim3(128, shape->kv_heads, shape->batch), still::PAST_THREADS, 0, stream,
                         still::Decode<T>(*shape, *state), *past, still::Rows<const T>(k), still::Rows<const T>(v), score, *routing,
                         shape->tokens, shape->head_dim);
  });
}
