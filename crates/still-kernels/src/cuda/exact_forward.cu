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

// What a lane has of its two queries, with the place of the largest logit among the stages' keys.
template <int NT>
struct ExactSums : OnlineSoftmax<NT> {
  int arg_max[2] = {0, 0};
};

// The logits of keys that a query does not see become -INFINITY.
template <int HEADS>
__device__ __forceinline__ void mask(float (&s)[8][4], const QueryBlock<HEADS>& at, int flags, int i) {
  if (at.is_own(i)) {
    each_sum(s, [&](float& x, int half, int column) {
      if (!sees_in_chunk(flags, at.row(half), column)) x = -INFINITY;
    });
  } else if (at.is_ragged(i)) {
    each_sum(s, [&](float& x, int, int column) {
      if ((i - at.window) * CHUNK + column >= at.seen) x = -INFINITY;
    });
  }
}

// Where `top` is in the lane's row `half` of stage i's logits, or 0: of the row's four lanes the one that has it keeps it.
__device__ __forceinline__ int place_of(const float (&s)[8][4], float top, int half, int i) {
  int place = 0;
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (s[n][half * 2 + e] == top) place = i * CHUNK + n * 8 + threadIdx.x % 4 * 2 + e;
  return place;
}

// The token at a place among the stages' keys.
template <int HEADS>
__device__ __forceinline__ int token_at(const QueryBlock<HEADS>& at, int place) {
  const int tile = place / CHUNK, column = place % CHUNK;
  return tile < at.window ? at.start - (at.window - 1 - tile) * CHUNK + column : at.list[(tile - at.window) * CHUNK + column];
}

// Adds the linear branch's share, of which `numerators(…)` has a row's, divides, and leaves outputs and what the backward pass needs.
template <class T, int HEADS, int NT, class Numerators>
__device__ __forceinline__ void leave_outputs(const Forward<T>& in, const QueryBlock<HEADS>& at, ExactSums<NT>& mine, Numerators numerators) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = at.row(half), t = at.start + row;
    float denominator = row_sum(mine.sum[half]);
    if (in.arg_max) {
      const int place = max(mine.arg_max[half], __shfl_xor_sync(0xffffffffu, mine.arg_max[half], 1));
      mine.arg_max[half] = max(place, __shfl_xor_sync(0xffffffffu, place, 2));
    }
    const int64_t to = (int64_t(at.b) * in.heads + at.head) * in.tokens + t;
    if (at.linear && t < in.tokens) denominator += in.denominator[to];
    __syncwarp();  // read by four lanes before one of them writes
    if (at.linear)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const float2 share = numerators(row, n * 8 + lane % 4 * 2);
        mine.out[n][half * 2] += share.x;
        mine.out[n][half * 2 + 1] += share.y;
      }
    store_row(t < in.tokens, in.out.row(at.b, at.head, t), mine.out, half, 1.f / denominator);
    if (t < in.tokens && lane % 4 == 0) {
      in.denominator[to] = denominator;
      if (in.maximum) in.maximum[to] = mine.m[half] / LOG2E;
      if (in.arg_max) in.arg_max[to] = token_at(at, mine.arg_max[half]);
    }
  }
}

template <class K, int HEADS>
__global__ void __launch_bounds__(HEADS * 128, K::P == 1 && K::D != 96 && K::D <= 128 ? 4 / HEADS : 1)
    exact_forward(const Forward<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, THREADS = HEADS * 128, STAGES = exact_stages(HEADS);
  constexpr bool IN_REGISTERS = !WARPGROUP<P, D>;
  using Queries = Tile<P, HEADS * CHUNK, D>;
  using Stage = Tile<P, 128, D>;  // 64 keys, 64 values
  extern __shared__ unsigned char memory[];
  const Queries queries{aligned(memory)};
  auto stage = [&](int i) { return Stage{queries.base + Queries::BYTES + i % STAGES * Stage::BYTES}; };
  const QueryBlock<HEADS> at(in, retired_before(in.routing, blockIdx.z));
  const int stages = at.stages, warp = threadIdx.x / 32;

  KeyStream<T, D, THREADS> keys{in.k, in.v, at.list, at.b, at.kv, at.start, at.seen, in.tokens, at.window, stages, in.routing.rounded};
  at.load(queries, in.q, in.tokens);
  keys.look_up(0);
#pragma unroll
  for (int i = 0; i + 1 < STAGES; i++) keys.load(i, stage(i));

  Left<P> q[KS];
  ExactSums<NT> mine;
  clear(mine.out);
  const float scale = rsqrtf(float(D)) * LOG2E;
  for (int i = 0; i < stages; i++) {
    copy_wait<STAGES - 2>();
    publish();
    __syncthreads();
    keys.load(i + STAGES - 1, stage(i + STAGES - 1));
    if (at.linear && i + 1 == stages) {  // the linear branch's numerators, for the end
#pragma unroll
      for (int h = 0; h < HEADS; h++)
        load_matrix<THREADS, CHUNK>(stage(stages + h / 2), h % 2 * CHUNK, static_cast<const T*>(in.out.row(at.b, at.first_head + h, at.start)),
                                    in.out.token, in.tokens - at.start);
      copy_commit();
    }
    if (IN_REGISTERS && i == 0)
#pragma unroll
      for (int k = 0; k < KS; k++) load_left(q[k], queries, warp * 16, k * 16);
    const Stage tile = stage(i);
    float s[8][4];
    logits<KS, 8>(s, q, queries, warp / 4 * CHUNK, tile, 0);
    mask(s, at, in.flags, i);
    weigh(mine, s, scale, [&](int half, float top, bool rises) {
      if (in.arg_max && rises) mine.arg_max[half] = place_of(s, top, half, i);  // seldom
    });
    Left<P> p[4];
#pragma unroll
    for (int k = 0; k < 4; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
    add_product<4, NT>(mine.out, p, tile, CHUNK);
  }

  copy_wait<0>();
  __syncthreads();
  leave_outputs(in, at, mine, [&](int row, int col) { return read_pair(stage(stages + warp / 8), warp / 4 % 2 * CHUNK + row, col); });
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
