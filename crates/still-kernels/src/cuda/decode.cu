// One token of every sequence. The blocks of one (sequence, KV head): some share the store, one answers from the ring (after
// adding the token to it) and scores the token, two a query head work the halves of the linear branch. Each leaves a partial
// result; the last to arrive merges them in order.
#include "decode_linear.cuh"
#include "decode_rows.cuh"
#include "last_block.cuh"
#include "self_saliency.cuh"
#include "values.cuh"

namespace still {

// The Self-Saliency Score of the token, from its logits over the last 64 tokens, which end at column 64 + position % 64. A warp
// takes every fourth head.
template <class T>
__device__ __forceinline__ void score_saliency(const Decode<T>& in, const Place& at, const float* window, float* four) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, self = CHUNK + at.position % CHUNK;
  float total = 0.f;
  for (int g = warp; g < in.group; g += 4) {
    const float *logits = window + g * RING + self, a = logits[-lane], c = logits[-lane - 32], own = logits[0];
    float m = fmaxf(a, c);
    for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, i));
    float rest = (lane == 0 ? 0.f : exp2f(a - m)) + exp2f(c - m);
    for (int i = 16; i > 0; i /= 2) rest += __shfl_xor_sync(0xffffffffu, rest, i);
    total += self_saliency(rest, exp2f(own - m));
  }
  if (lane == 0) four[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) in.ring_score[at.bk * RING + at.position % RING] = (four[0] + four[1] + four[2] + four[3]) / in.group;
}

// What the ring's tokens receive of the token's softmax over it, all heads together. A thread has a column of the logits.
template <class T>
__device__ __forceinline__ void score_received(const Decode<T>& in, const Place& at, const float* window, float* four) {
  const int column = threadIdx.x, self = CHUNK + at.position % CHUNK;
  float received = 0.f;
  for (int g = 0; g < in.group; g++) {
    const float logit = window[g * RING + column], m = over_block<true>(logit, four), e = exp2f(logit - m);
    received += e / over_block<false>(e, four);
  }
  float* score = in.ring_score + at.bk * RING + (at.chunk + 1 + column / CHUNK) % 2 * CHUNK + column % CHUNK;
  if (column < self) *score += received;
  if (column == self) *score = 0.f;  // by later tokens alone
}

// What the router keeps of the token. By some routers the score is known only when the chunk retires.
template <class T>
__device__ __forceinline__ void score_token(const Decode<T>& in, const Place& at, const float* window, float* four) {
  if (in.router.kind == STILL_SELF_SALIENCY) return score_saliency(in, at, window, four);
  if (in.router.kind == STILL_RECEIVED_ATTENTION) return score_received(in, at, window, four);
  if (threadIdx.x == 0) in.ring_score[at.bk * RING + at.position % RING] = position_score(in.router, at.kv, at.position);
}

// The output: weights of the ring's part and of the parts of the store that had work, then the sums, all heads at once.
template <class K>
__device__ __forceinline__ void merge_parts(const Decode<typename K::T>& in, const Place& at, float* weights, float (&factor)[GROUP]) {
  using T = typename K::T;
  constexpr int D = K::D;
  const int used = (at.share > 0 ? (at.tiles + at.share - 1) / at.share : 0) + 1;
  float* shares = weights + in.group * MOST_PARTS;  // both [group, used]
  auto exact = [&](int p) { return at.template partial<D>(in, p == used - 1 ? at.ring_part : p); };
  auto linear = [&](int p) { return at.template partial<D>(in, at.ring_part + 1 + p); };
  for (int i = threadIdx.x; i < in.group * used; i += 128) {
    const float* from = exact(i % used) + GROUP * D + i / used;
    weights[i / used * MOST_PARTS + i % used] = from[0];
    shares[i / used * MOST_PARTS + i % used] = from[GROUP];
  }
  __syncthreads();
  if (threadIdx.x < in.group) {
    const int g = threadIdx.x;
    float *w = weights + g * MOST_PARTS, m = -INFINITY;
    for (int i = 0; i < used; i++) m = fmaxf(m, w[i]);
    float den = linear(2 * g)[GROUP * D] + linear(2 * g + 1)[GROUP * D];
    for (int i = 0; i < used; i++) den += shares[g * MOST_PARTS + i] * (w[i] = exp2f(w[i] - m));
    for (int i = 0; i < used; i++) w[i] /= den;
    factor[g] = 1.f / den;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < in.group * D; i += 128) {
    const int g = i / D, d = i % D;
    float num = (linear(2 * g)[d] + linear(2 * g + 1)[d]) * factor[g];
    if (in.gate.data) num *= to_f32(in.gate.row(at.b, at.kv * in.group + g, 0)[d]);
#pragma unroll 8
    for (int p = 0; p < used; p++) num += exact(p)[i] * weights[g * MOST_PARTS + p];
    in.out.row(at.b, at.kv * in.group + g, 0)[d] = T(num);
  }
}

template <class K, int CODING, bool EACH>
__global__ void __launch_bounds__(128, K::P == 1 && K::D <= 128 ? 3 : 1) decode_attend(const Decode<typename K::T> state) {
  constexpr int D = K::D;
  let_next_begin();
  const int position = state.positions[blockIdx.z];
  if (position < 0) return wait_for_previous();
  const Stored<typename K::T> in(state.template own<EACH>(blockIdx.z, D), EACH);
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ DecodeScratch<D> scratch;
  const DecodeMemory<K> memory(dynamic);
  const Place at(in, position);
  float* const mine = at.template partial<D>(in, at.part);

  if (at.idle()) {
    // Only counted.
  } else if (at.part <= at.ring_part) {
    OnlineSoftmax<D / 8> sums;
    attend_rows<K, CODING>(in, at, memory, sums);
    merge_warps<K>(sums, in.group, memory.floats, scratch.warps, mine);  // the stages are done with
  } else {
    attend_state<K>(in, at, memory, scratch, mine);
  }
  if (is_last_block(in.arrived + at.bk, gridDim.x)) {
    wait_for_previous();  // an idle part has not yet
    merge_parts<K>(in, at, memory.floats, scratch.warps.sums[0]);
  }
  if (at.part == at.ring_part) score_token(in, at, memory.window(), scratch.four);
}

// Rows of a sequence that was read at once: salient ones to the store, the last two chunks to the ring.
template <class T>
__global__ void __launch_bounds__(128) decode_fill(Rows<const T> k, Rows<const T> v, const float* score, const StillRouting routing,
                                                   const Decode<T> state, int tokens, int d) {
  const Stored<T> in(state);
  const int kv = blockIdx.y, b = blockIdx.z, chunks = (tokens + CHUNK - 1) / CHUNK;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int retired = max(chunks - 2, 0), kept = kept_tokens(in.cap, in.budgets[kv], retired), begin = retired * CHUNK;
  const int32_t* list = visible_list(routing, bk, chunks - 1, chunks, tokens);
  for (int row = blockIdx.x; row < kept + tokens - begin; row += gridDim.x) {
    const bool store = row < kept;
    const int t = store ? list[row] : begin + row - kept;
    const int64_t to = store ? in.store(b, kv) + row : bk * RING + t % RING;
    for (int i = threadIdx.x; i < d; i += 128) {
      (store ? in.store_k : in.ring_k)[to * d + i] = k.row(b, kv, t)[i];
      (store ? in.store_v : in.ring_v)[to * d + i] = v.row(b, kv, t)[i];
    }
    if (threadIdx.x == 0 && !store) in.ring_score[to] = ring_score(in.router, score[bk * tokens + t], t, tokens, in.group);
    if (threadIdx.x == 0 && store && in.store_score) {
      in.store_score[to] = score[bk * tokens + t];
      in.store_token[to] = t;
    }
  }
}

int run_decode_recall(const StillShape&, const StillDecode&, StillStream);
int run_decode_admit(const StillShape&, const StillDecode&, StillStream);
int run_decode_retire(const StillShape&, const StillDecode&, StillStream);

}  // namespace still

extern "C" int64_t still_decode_floats(const StillShape* shape, int32_t splits) {
  const int group = shape->heads / shape->kv_heads;
  return int64_t(shape->batch) * shape->kv_heads * (splits + 1 + 2 * group) * still::GROUP * (shape->head_dim + 2);
}

extern "C" int still_decode(const StillShape* shape, const StillDecode* args, StillStream stream) {
  if (!still::valid(*shape) || shape->heads / shape->kv_heads > still::GROUP || args->splits < 1 || args->splits > 64) return cudaErrorInvalidValue;
  if (args->cos && (args->rotary < 0 || args->rotary % 16 || args->rotary > shape->head_dim)) return cudaErrorInvalidValue;
  if (args->router.kind == STILL_SELF_RECALL)
    if (int error = still::run_decode_recall(*shape, *args, stream)) return error;
  if (args->cap != STILL_NO_CAP)
    if (int error = still::run_decode_admit(*shape, *args, stream)) return error;
  if (int error = still::run_decode_retire(*shape, *args, stream)) return error;
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    const int group = shape->heads / shape->kv_heads, parts = args->splits + 1 + 2 * group;
    auto run = [&](auto kernel) {
      return still::launch_early(kernel, dim3(parts, shape->kv_heads, shape->batch), 128, still::DecodeMemory<K>::bytes(group), stream,
                           still::Decode<typename K::T>(*shape, *args));
    };
    auto either = [&](auto coding) {
      constexpr int CODING = decltype(coding)::value;
      return args->states ? run(still::decode_attend<K, CODING, true>) : run(still::decode_attend<K, CODING, false>);
    };
    switch (args->coding) {
      case STILL_PLAIN: return either(std::integral_constant<int, STILL_PLAIN>{});
      case STILL_INT8: return either(std::integral_constant<int, STILL_INT8>{});
      case STILL_INT4: return either(std::integral_constant<int, STILL_INT4>{});
      default: return int(cudaErrorInvalidValue);
    }
  });
}

extern "C" int still_decode_fill(const StillShape* shape, StillRows k, StillRows v, const float* score, const StillRouting* routing,
                                 const StillDecode* args, StillStream stream) {
  if (args->coding != STILL_PLAIN) return cudaErrorInvalidValue;
  return still::dispatch_forward(*shape, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return still::launch(still::decode_fill<T>, dim3(128, shape->kv_heads, shape->batch), 128, 0, stream, still::Rows<const T>(k),
                         still::Rows<const T>(v), score, *routing, still::Decode<T>(*shape, *args), shape->tokens, shape->head_dim);
  });
}
