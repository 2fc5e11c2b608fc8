// The router self_recall over whole sequences. A score depends on the state, and the state on what was selected before: one block
// walks the chunks of a (sequence, KV head). What is salient lies in shared memory by rank, as in `demote`.
#include "decode.cuh"
#include "recall_walk.cuh"

namespace still {

template <class K>
__global__ void __launch_bounds__(4 * K::D, 512 / (4 * K::D)) recall(const Recall<typename K::T> in) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Ranked unranked[CHUNK], arrivals[CHUNK];
  __shared__ int entering[CHUNK];
  __shared__ uint32_t chosen[2];
  RecallWalk<K> walk(in, memory);
  walk.begin();
  for (int chunk = 0; chunk < in.retired; chunk++) {
    const int before = walk.capped ? walk.kept_after(chunk) : 0, after = walk.capped ? walk.kept_after(chunk + 1) : walk.budget;
    const int leaving = before + CHUNK - after;
    if (threadIdx.x < 2) chosen[threadIdx.x] = 0;
    __syncthreads();
    walk.score_chunk(chunk, before, unranked);
    __syncthreads();
    walk.rank(unranked, arrivals, chosen, before);
    __syncthreads();
    walk.swap_kept();
    walk.leave_selected(chunk, uint64_t(chosen[1]) << 32 | chosen[0]);
    walk.merge(chunk, arrivals, before, after, entering);
    __syncthreads();
    if (walk.capped) {
      walk.leave_order(chunk, entering, leaving);
      walk.swap_kept();
    }
    // What leaves enters the state, to score the next chunk.
    walk.map_leaving(entering, leaving);
    __syncthreads();
    walk.absorb(entering, leaving);
    __syncthreads();
  }
  if (!in.past.retired) walk.end();
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
