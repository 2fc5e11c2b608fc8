// The router self_recall over whole sequences. A score depends on the state, and the state on what was selected before: one block
// walks the chunks of a (sequence, KV head). What is salient lies in shared memory by rank, as in `demote`.
#include "decode.cuh"
#include "ranked.cuh"
#include "recall.cuh"

namespace still {

template <class T>
struct Recall {
  Rows<const T> k, v;
  const T* w;
  StillRouting routing;
  StillPast past;
  float *s, *z, *score;
  int tokens, chunks, retired, kv_heads, flags;
};

template <class K>
__global__ void __launch_bounds__(4 * K::D) recall(const Recall<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, THREADS = 4 * D, WARPS = THREADS / 32, FEATURES = 16;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Ranked unranked[CHUNK], arrivals[CHUNK];
  __shared__ int entering[CHUNK];
  __shared__ uint32_t chosen[2];
  const bool capped = in.routing.cap != STILL_NO_CAP;
  const int slots = capped ? in.routing.cap : 0;
  float* const phi = reinterpret_cast<float*>(memory);  // [CHUNK, 2D]
  Ranked *old = reinterpret_cast<Ranked*>(phi + CHUNK * 2 * D), *next = old + slots;
  const int kv = blockIdx.x, b = blockIdx.y, t = threadIdx.x, warp = t / 32, lane = t % 32;
  const int64_t row = int64_t(b) * in.kv_heads + kv;
  const int budget = in.routing.budgets[kv], retired_before = in.past.retired ? in.past.retired[b] : 0;
  const int stored = kept_tokens(in.routing.cap, budget, retired_before);
  const T* w = in.w + int64_t(kv) * D * D;
  float *s = in.s + row * 2 * D * D, *z = in.z + row * 2 * D, *score = in.score + row * in.tokens;
  uint64_t* selected = const_cast<uint64_t*>(in.routing.selected) + row * in.chunks;
  int32_t* list = const_cast<int32_t*>(in.routing.salient) + row * (in.tokens + in.routing.stored);
  uint32_t* absorbed_at = in.routing.absorbed_at ? const_cast<uint32_t*>(in.routing.absorbed_at) + row * in.tokens : nullptr;
  int32_t* visible = const_cast<int32_t*>(in.routing.visible) + row * in.chunks * slots;
  int32_t* order = const_cast<int32_t*>(in.routing.order) + row * in.retired * CHUNK;

  for (int i = t; i < in.tokens; i += THREADS) score[i] = 0.f;
  for (int i = in.retired + t; i < in.chunks; i += THREADS) selected[i] = 0;
  for (int i = t; i < stored; i += THREADS) {
    list[i] = i - stored;
    if (!capped) continue;
    old[i] = {0.f, i - stored};
    for (int chunk = 0; chunk < min(in.chunks, 2); chunk++) visible[int64_t(chunk) * slots + i] = i - stored;
  }
  auto key = [&](int token) { return in.k.row(b, kv, token); };
  auto value = [&](int token) { return in.v.row(b, kv, token); };
  for (int chunk = 0; chunk < in.retired; chunk++) {
    const int before = capped ? kept_tokens(in.routing.cap, budget, retired_before + chunk) : 0;
    const int after = capped ? kept_tokens(in.routing.cap, budget, retired_before + chunk + 1) : budget;
    const int count = before + CHUNK, leaving = before + CHUNK - after;
    auto candidate = [&](int i) { return i < before ? old[i].token : chunk * CHUNK + i - before; };
    if (t < 2) chosen[t] = 0;
    __syncthreads();
    for (int first = warp * RECALLED; first < count; first += WARPS * RECALLED) {
      const T *k[RECALLED], *v[RECALLED];
      float error[RECALLED];
#pragma unroll
      for (int c = 0; c < RECALLED; c++) {
        k[c] = first + c < count ? key(candidate(first + c)) : nullptr;
        v[c] = first + c < count ? value(candidate(first + c)) : nullptr;
      }
      recall_errors<K>(k, v, w, s, z, in.flags, error);
#pragma unroll
      for (int c = 0; c < RECALLED; c++) {
        const int i = first + c;
        if (lane > 0 || i >= count) continue;
        if (i < before) {
          old[i].score = sound(error[c]);
        } else {
          unranked[i - before] = {sound(error[c]), candidate(i)};
          score[candidate(i)] = error[c];
        }
      }
    }
    __syncthreads();
    if (t < CHUNK) {
      int rank = 0;
      for (int i = 0; i < CHUNK; i++) rank += is_before(unranked[i], unranked[t]);
      arrivals[rank] = unranked[t];
      if (rank < budget) atomicOr(&chosen[t / 32], 1u << t % 32);
    }
    for (int i = t; i < before; i += THREADS) {
      int rank = 0;
      for (int j = 0; j < before; j++) rank += is_before(old[j], old[i]);
      next[rank] = old[i];
    }
    __syncthreads();
    Ranked* other = old;
    old = next;
    next = other;
    const uint64_t mask = uint64_t(chosen[1]) << 32 | chosen[0];
    if (t == 0) selected[chunk] = mask;
    if (!capped && absorbed_at && t < CHUNK) absorbed_at[chunk * CHUNK + t] = mask >> t & 1 ? UINT32_MAX : chunk + 2;
    if (t < CHUNK && mask >> t & 1) list[stored + chunk * budget + __popcll(mask & ((uint64_t(1) << t) - 1))] = chunk * CHUNK + t;
    // By rank among what was and what is to be kept; the rest enters the state.
    auto place = [&](Ranked x, int rank) {
      if (!capped || rank < after) {
        if (!capped) return;
        next[rank] = x;
        visible[int64_t(chunk + 2) * slots + rank] = x.token;
      } else {  // behind the tokens that were not selected at all
        entering[CHUNK - budget + rank - after] = x.token;
      }
    };
    for (int i = t; i < before; i += THREADS) place(old[i], i + count_before(arrivals, budget, old[i]));
    if (t < budget) place(arrivals[t], t + count_before(old, before, arrivals[t]));
    if (t >= budget && t < CHUNK) entering[t - budget] = arrivals[t].token;
    __syncthreads();
    if (capped && t < CHUNK) {
      if (t < leaving) {
        order[chunk * CHUNK + t] = entering[t];
        if (absorbed_at) absorbed_at[entering[t]] = chunk + 2;
      } else if (in.past.retired) {
        order[chunk * CHUNK + t] = NO_TOKEN;
      }
    }
    if (capped) {
      other = old;
      old = next;
      next = other;
    }
    // What leaves enters the state, to score the next chunk.
    for (int first = warp * RECALLED; first < leaving; first += WARPS * RECALLED) {
      const T* k[RECALLED];
      float plus[RECALLED][PLACES<D>], minus[RECALLED][PLACES<D>];
#pragma unroll
      for (int c = 0; c < RECALLED; c++) k[c] = first + c < leaving ? key(entering[first + c]) : nullptr;
      map_rows<K>(k, w, in.flags, plus, minus);
#pragma unroll
      for (int c = 0; c < RECALLED; c++)
#pragma unroll
        for (int l = 0; l < PLACES<D>; l++)
          if (first + c < leaving && has_place<D>(l)) {
            phi[(first + c) * 2 * D + lane + l * 32] = plus[c][l];
            phi[(first + c) * 2 * D + D + lane + l * 32] = minus[c][l];
          }
    }
    __syncthreads();
    const int channel = t % D;
    for (int f = t / D; f < 2 * D; f += 4 * FEATURES) {
      float sum[FEATURES];
#pragma unroll
      for (int i = 0; i < FEATURES; i++) sum[i] = 0.f;
      for (int e = 0; e < leaving; e++) {
        const float x = to_f32(value(entering[e])[channel]);
#pragma unroll
        for (int i = 0; i < FEATURES; i++)
          if (f + 4 * i < 2 * D) sum[i] += phi[e * 2 * D + f + 4 * i] * x;
      }
#pragma unroll
      for (int i = 0; i < FEATURES; i++)
        if (f + 4 * i < 2 * D) s[int64_t(f + 4 * i) * D + channel] += sum[i];
    }
    if (t < 2 * D) {
      float sum = 0.f;
      for (int e = 0; e < leaving; e++) sum += phi[e * 2 * D + t];
      z[t] += sum;
    }
    __syncthreads();
  }
  if (in.past.retired) return;
  // Those that are left take the places of what did not leave when they, or as many others, came.
  for (int i = t; capped && i < kept_tokens(in.routing.cap, budget, in.retired); i += THREADS) {
    const int chunk = i / budget, before = kept_tokens(in.routing.cap, budget, chunk), after = kept_tokens(in.routing.cap, budget, chunk + 1);
    order[chunk * CHUNK + CHUNK - (after - before) + i - before] = ~old[i].token;
    absorbed_at[old[i].token] = UINT32_MAX;
  }
  if (absorbed_at)
    for (int i = in.retired * CHUNK + t; i < in.tokens; i += THREADS) absorbed_at[i] = UINT32_MAX;
}

// The scores of a chunk that retires in a step, and, under a cap, of what is stored.
template <class K, bool EACH>
__global__ void __launch_bounds__(128) decode_recall(const Decode<typename K::T> state) {
  using T = typename K::T;
  let_next_begin();
  const int kv = blockIdx.y, b = blockIdx.z, position = state.positions[b];
  wait_for_previous();
  if (!retires(position)) return;
  const Stored<T> in(state.template own<EACH>(b, K::D), EACH);
  const int chunk = position / CHUNK - 2, stored = in.cap == STILL_NO_CAP ? 0 : kept_tokens(in.cap, in.budgets[kv], chunk);
  const int64_t bk = int64_t(b) * in.kv_heads + kv, ring = bk * RING + chunk % 2 * CHUNK, store = in.store(b, kv);
  const float *s = in.s + bk * 2 * K::D * K::D, *z = in.z + bk * 2 * K::D;
  const T* w = in.w_k + int64_t(kv) * K::D * K::D;
  const int count = CHUNK + stored, warps = gridDim.x * 4;
  for (int first = (blockIdx.x * 4 + threadIdx.x / 32) * RECALLED; first < count; first += warps * RECALLED) {
    const T *k[RECALLED], *v[RECALLED];
    float error[RECALLED];
#pragma unroll
    for (int c = 0; c < RECALLED; c++) {
      const int i = first + c;
      k[c] = i >= count ? nullptr : (i < CHUNK ? in.ring_k + (ring + i) * K::D : in.store_k + (store + i - CHUNK) * K::D);
      v[c] = i >= count ? nullptr : (i < CHUNK ? in.ring_v + (ring + i) * K::D : in.store_v + (store + i - CHUNK) * K::D);
    }
    recall_errors<K>(k, v, w, s, z, in.flags, error);
    if (threadIdx.x % 32 > 0) continue;
#pragma unroll
    for (int c = 0; c < RECALLED; c++) {
      const int i = first + c;
      if (i < CHUNK) in.ring_score[ring + i] = error[c];
      else if (i < count) in.store_score[store + i - CHUNK] = error[c];
    }
  }
}

int run_decode_recall(const StillShape& shape, const StillDecode& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    return launch_early(args.states ? decode_recall<K, true> : decode_recall<K, false>, dim3(16, shape.kv_heads, shape.batch), 128, 0, stream,
                  Decode<typename K::T>(shape, args));
  });
}

}  // namespace still

extern "C" int still_recall(const StillShape* shape, StillRows k, StillRows v, const void* w, const StillRouting* routing,
                            const StillPast* past, float* s, float* z, float* score, StillStream stream) {
  return still::dispatch(*shape, [&](auto kind) -> int {
    using K = decltype(kind);
    using T = typename K::T;
    const int cap = routing->cap == STILL_NO_CAP ? 0 : routing->cap;
    if (cap < 0 || cap > 8192) return cudaErrorInvalidValue;
    const still::Recall<T> in{still::Rows<const T>(k), still::Rows<const T>(v), static_cast<const T*>(w), *routing, past ? *past : StillPast{}, s, z,
                              score, shape->tokens, still::chunks(*shape), still::retired(*shape), shape->kv_heads, shape->flags};
    const int bytes = still::CHUNK * 2 * K::D * 4 + 2 * cap * int(sizeof(still::Ranked));
    return still::launch(still::recall<K>, dim3(shape->kv_heads, shape->batch), 4 * K::D, bytes, stream, in);
  });
}
