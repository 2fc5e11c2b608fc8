// The stages of a block that goes through the chunks of a (sequence, KV head) by the router self_recall: score, rank, absorb.
#pragma once
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

// One (sequence, KV head) that a block walks through.
template <class K>
struct RecallWalk {
  using T = typename K::T;
  static constexpr int D = K::D, THREADS = 4 * D, WARPS = THREADS / 32;
  const Recall<T>& in;
  int b, kv, budget, slots;        // `slots`: the cap, 0 without one
  int retired_before, stored;      // chunks that had retired, and what they had stored
  bool capped;
  const T* w;
  float *s, *z, *score;
  uint64_t* selected;
  uint32_t* absorbed_at;           // null: not wanted
  int32_t *list, *visible, *order;
  float* phi;                      // shared: [CHUNK, 2D] of what leaves
  Ranked *old, *next;              // shared: what is kept by rank, before and after

  __device__ __forceinline__ RecallWalk(const Recall<T>& in, unsigned char* memory)
      : in(in), b(blockIdx.y), kv(blockIdx.x), budget(in.routing.budgets[kv]), slots(in.routing.cap != STILL_NO_CAP ? in.routing.cap : 0),
        retired_before(in.past.retired ? in.past.retired[b] : 0), stored(kept_tokens(in.routing.cap, budget, retired_before)),
        capped(in.routing.cap != STILL_NO_CAP), w(in.w + int64_t(kv) * D * D), phi(reinterpret_cast<float*>(memory)),
        old(reinterpret_cast<Ranked*>(phi + CHUNK * 2 * D)), next(old + slots) {
    const int64_t row = int64_t(b) * in.kv_heads + kv;
    s = in.s + row * 2 * D * D;
    z = in.z + row * 2 * D;
    score = in.score + row * in.tokens;
    selected = const_cast<uint64_t*>(in.routing.selected) + row * in.chunks;
    list = const_cast<int32_t*>(in.routing.salient) + row * (in.tokens + in.routing.stored);
    absorbed_at = in.routing.absorbed_at ? const_cast<uint32_t*>(in.routing.absorbed_at) + row * in.tokens : nullptr;
    visible = const_cast<int32_t*>(in.routing.visible) + row * in.chunks * slots;
    order = const_cast<int32_t*>(in.routing.order) + row * in.retired * CHUNK;
  }
  __device__ __forceinline__ const T* key(int token) const { return in.k.row(b, kv, token); }
  __device__ __forceinline__ const T* value(int token) const { return in.v.row(b, kv, token); }
  __device__ __forceinline__ int kept_after(int chunks) const { return kept_tokens(in.routing.cap, budget, retired_before + chunks); }
  __device__ __forceinline__ void swap_kept() {
    Ranked* other = old;
    old = next;
    next = other;
  }

  // What nothing is known of, and what the state had stored.
  __device__ __forceinline__ void begin() const {
    for (int i = threadIdx.x; i < in.tokens; i += THREADS) score[i] = 0.f;
    for (int i = in.retired + threadIdx.x; i < in.chunks; i += THREADS) selected[i] = 0;
    for (int i = threadIdx.x; i < stored; i += THREADS) {
      list[i] = i - stored;
      if (!capped) continue;
      old[i] = {0.f, i - stored};
      for (int chunk = 0; chunk < min(in.chunks, 2); chunk++) visible[int64_t(chunk) * slots + i] = i - stored;
    }
  }

  // How badly the state recalls what is kept (`before` of it; only under a cap is it scored again) and the chunk's tokens, which come
  // to `unranked`. A warp has some rows.
  __device__ __forceinline__ void score_chunk(int chunk, int before, Ranked* unranked) const {
    const int count = before + CHUNK;
    auto candidate = [&](int i) { return i < before ? old[i].token : chunk * CHUNK + i - before; };
    for (int first = threadIdx.x / 32 * RECALLED; first < count; first += WARPS * RECALLED) {
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
        if (threadIdx.x % 32 > 0 || i >= count) continue;
        if (i < before) {
          old[i].score = sound(error[c]);
        } else {
          unranked[i - before] = {sound(error[c]), candidate(i)};
          score[candidate(i)] = error[c];
        }
      }
    }
  }

  // Ranks the chunk's tokens, whose first `budget` are `chosen`, and what is kept, by their new scores.
  __device__ __forceinline__ void rank(const Ranked* unranked, Ranked* arrivals, uint32_t* chosen, int before) const {
    const int t = threadIdx.x;
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
  }

  __device__ __forceinline__ void leave_selected(int chunk, uint64_t mask) const {
    const int t = threadIdx.x;
    if (t == 0) selected[chunk] = mask;
    if (!capped && absorbed_at && t < CHUNK) absorbed_at[chunk * CHUNK + t] = mask >> t & 1 ? UINT32_MAX : chunk + 2;
    if (t < CHUNK && mask >> t & 1) list[stored + chunk * budget + __popcll(mask & ((uint64_t(1) << t) - 1))] = chunk * CHUNK + t;
  }

  // By rank among what was kept and what is to be: `after` stay, the rest is what enters the state.
  __device__ __forceinline__ void merge(int chunk, const Ranked* arrivals, int before, int after, int* entering) const {
    const int t = threadIdx.x;
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
  }

  // Under a cap, the order in which tokens are absorbed.
  __device__ __forceinline__ void leave_order(int chunk, const int* entering, int leaving) const {
    const int t = threadIdx.x;
    if (t >= CHUNK) return;
    if (t < leaving) {
      order[chunk * CHUNK + t] = entering[t];
      if (absorbed_at) absorbed_at[entering[t]] = chunk + 2;
    } else if (in.past.retired) {
      order[chunk * CHUNK + t] = NO_TOKEN;
    }
  }

  // phi of the keys that leave. A warp has some rows.
  __device__ __forceinline__ void map_leaving(const int* entering, int leaving) const {
    const int lane = threadIdx.x % 32;
    for (int first = threadIdx.x / 32 * RECALLED; first < leaving; first += WARPS * RECALLED) {
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
  }

  // S += phi' v and z += phi. A thread has one channel of every fourth feature, FEATURES at a time.
  __device__ __forceinline__ void absorb(const int* entering, int leaving) const {
    constexpr int FEATURES = 16;
    const int t = threadIdx.x, channel = t % D;
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
  }

  // Those that are left take the places of what did not leave when they, or as many others, came.
  __device__ __forceinline__ void end() const {
    const int t = threadIdx.x;
    for (int i = t; capped && i < kept_tokens(in.routing.cap, budget, in.retired); i += THREADS) {
      const int chunk = i / budget, before = kept_tokens(in.routing.cap, budget, chunk), after = kept_tokens(in.routing.cap, budget, chunk + 1);
      order[chunk * CHUNK + CHUNK - (after - before) + i - before] = ~old[i].token;
      absorbed_at[old[i].token] = UINT32_MAX;
    }
    if (absorbed_at)
      for (int i = in.retired * CHUNK + t; i < in.tokens; i += THREADS) absorbed_at[i] = UINT32_MAX;
  }
};

}  // namespace still
