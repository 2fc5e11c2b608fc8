// The exact branch: salient tokens and window of one chunk's queries, with an online softmax; then the linear branch's share,
// which is not rescaled, is added and the result divided.
//
// A block answers 64 queries of HEADS query heads of one KV head; four warps share a head. Keys and values stream through a
// ring of stages of 64 tokens.
#include "forward.cuh"
#include "key_stream.cuh"
#include "online_softmax.cuh"
#include "wgmma.cuh"

namespace still {

// Stages of keys and values in shared memory. After the last, linear numerators of two heads lie in each of those that are free.
constexpr int exact_stages(int heads) { return heads == 4 ? 3 : 2; }

template <class K, int HEADS>
__global__ void __launch_bounds__(HEADS * 128, K::P == 1 && K::D != 96 && K::D <= 128 ? 4 / HEADS : 1)
    exact_forward(const Forward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, THREADS = HEADS * 128;
  constexpr bool IN_REGISTERS = !WARPGROUP<P, D>;
  using Queries = Tile<P, HEADS * CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 keys, 64 values
  constexpr int STAGES = exact_stages(HEADS);
  extern __shared__ unsigned char memory[];
  const Queries queries{aligned(memory)};
  auto stage = [&](int i) { return Stage{queries.base + Queries::BYTES + i % STAGES * Stage::BYTES}; };

  const int parts = in.group / HEADS, chunk = in.chunks - 1 - blockIdx.y, start = chunk * CHUNK;  // the longest first
  const int kv = blockIdx.x / parts, first_head = kv * in.group + blockIdx.x % parts * HEADS, b = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = first_head + warp / 4, first_row = warp % 4 * 16;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int retired = retired_before(in.routing, b) + max(chunk - 1, 0), kept = kept_tokens(in.routing.cap, in.routing.budgets[kv], retired);
  const bool linear = retired * CHUNK > kept;
  const int window = window_chunks(in.flags, chunk), seen = in.flags & STILL_NO_SALIENT ? 0 : kept, stages = window + (seen + CHUNK - 1) / CHUNK;
  const int32_t* list = visible_list(in.routing, bk, chunk, in.chunks, in.tokens);

  KeyStream<T, D, THREADS> keys{in.k, in.v, list, b, kv, start, seen, in.tokens, window, stages, in.routing.rounded};
#pragma unroll
  for (int h = 0; h < HEADS; h++)
    load_matrix<THREADS, CHUNK>(queries, h * CHUNK, in.q.row(b, first_head + h, start), in.q.token, in.tokens - start);
  keys.look_up(0);
#pragma unroll
  for (int i = 0; i + 1 < STAGES; i++) keys.load(i, stage(i));

  Left<P> q[KS];
  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // m in base 2
  int arg_max[2] = {0, 0};
  clear(out);
  const float scale = rsqrtf(float(D)) * LOG2E;

  for (int i = 0; i < stages; i++) {
    copy_wait<STAGES - 2>();
    publish();
    __syncthreads();
    keys.load(i + STAGES - 1, stage(i + STAGES - 1));
    if (linear && i + 1 == stages) {  // the linear branch's numerators, for the end
#pragma unroll
      for (int h = 0; h < HEADS; h++)
        load_matrix<THREADS, CHUNK>(stage(stages + h / 2), h % 2 * CHUNK, static_cast<const T*>(in.out.row(b, first_head + h, start)), in.out.token, in.tokens - start);
      copy_commit();
    }
    if (IN_REGISTERS && i == 0)
#pragma unroll
      for (int k = 0; k < KS; k++) load_left(q[k], queries, warp * 16, k * 16);
    const Stage tile = stage(i);
    float s[8][4];
    logits<KS, 8>(s, q, queries, warp / 4 * CHUNK, tile, 0);
    if (i == window - 1) {  // this chunk: no key after the query, or none but its own
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (!sees_in_chunk(in.flags, first_row + lane / 4 + e / 2 * 8, n * 8 + lane % 4 * 2 + e % 2)) s[n][e] = -INFINITY;
    } else if (i >= window && (i - window + 1) * CHUNK > seen) {
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if ((i - window) * CHUNK + n * 8 + lane % 4 * 2 + e % 2 >= seen) s[n][e] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float top = row_top(s, half), raised = fmaxf(m[half], top * scale);
      if (in.arg_max && raised > m[half]) {  // seldom; of the row's four lanes the one that found it keeps it
        arg_max[half] = 0;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (s[n][half * 2 + e] == top) arg_max[half] = i * CHUNK + n * 8 + lane % 4 * 2 + e;
      }
      rescale(out, sum[half], half, exp2_fast(m[half] - raised));
      m[half] = raised;
      add_weights(s, sum[half], half, [&](float x) { return exp2_fast(x * scale - raised); });
    }
    Left<P> p[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
    add_product<4, NT>(out, p, tile, CHUNK);
  }

  copy_wait<0>();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + lane / 4 + half * 8, t = start + row;
    float denominator = row_sum(sum[half]);
    if (in.arg_max) {
      int at = max(arg_max[half], __shfl_xor_sync(0xffffffffu, arg_max[half], 1));
      arg_max[half] = max(at, __shfl_xor_sync(0xffffffffu, at, 2));
    }
    const int64_t at = (int64_t(b) * in.heads + head) * in.tokens + t;
    if (linear && t < in.tokens) denominator += in.denominator[at];
    __syncwarp();  // read by four lanes before one of them writes
    if (linear)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float2 share = read_pair(stage(stages + warp / 8), warp / 4 % 2 * CHUNK + row, n * 8 + lane % 4 * 2);
        out[n][half * 2] += share.x;
        out[n][half * 2 + 1] += share.y;
      }
    store_row(t < in.tokens, in.out.row(b, head, t), out, half, 1.f / denominator);
    if (t < in.tokens && lane % 4 == 0) {
      in.denominator[at] = denominator;
      if (in.maximum) in.maximum[at] = m[half] / LOG2E;
      if (in.arg_max) {
        const int tile = arg_max[half] / CHUNK, column = arg_max[half] % CHUNK;
        in.arg_max[at] = tile < window ? start - (window - 1 - tile) * CHUNK + column : list[(tile - window) * CHUNK + column];
      }
    }
  }
}

}  // namespace still

extern "C" int still_exact_forward(const StillShape* shape, const StillForward* args, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    still::Forward<typename K::T> in(*shape, *args);
    auto run = [&](auto kernel, auto heads) {
      constexpr int HEADS = decltype(heads)::value;
      constexpr int bytes =
          still::Tile<K::P, HEADS * 64, K::D>::BYTES + still::exact_stages(HEADS) * still::Tile<K::P, 128, K::D>::BYTES + still::ALIGNMENT;
      return still::launch(kernel, dim3(shape->heads / HEADS, in.chunks - in.first_chunk, shape->batch), HEADS * 128, bytes, stream, in);
    };
    // What keys and values take of the second-level cache's speed goes with the number of blocks.
    if constexpr (K::P == 1 && K::D != 96 && K::D <= 128)
      if (in.group % 4 == 0) return run(still::exact_forward<K, 4>, std::integral_constant<int, 4>{});
    return in.group % 2 == 0 ? run(still::exact_forward<K, 2>, std::integral_constant<int, 2>{})
                             : run(still::exact_forward<K, 1>, std::integral_constant<int, 1>{});
  });
}

extern "C" int still_forward(const StillShape* shape, const StillForward* args, StillStream stream) {
  int error = still_linear_forward(shape, args, stream);
  return error ? error : still_exact_forward(shape, args, stream);
}
