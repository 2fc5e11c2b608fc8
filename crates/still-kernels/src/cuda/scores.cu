// The scores of all routers but self_recall, for whole sequences.
#include "decode.cuh"
#include "wgmma.cuh"

namespace still {

// Tokens that may follow others: those before `begin` were scored in another call, those from `end` on are padding.
struct Span {
  const int32_t *begin, *end;  // [B], or null: all
  __device__ __forceinline__ bool has(int b, int t, int tokens) const { return t >= (begin ? begin[b] : 0) && t < (end ? end[b] : tokens); }
};

__global__ void __launch_bounds__(256) position_scores(const StillRouter router, const int32_t* retired, float* score, int tokens) {
  const int t = blockIdx.x * 256 + threadIdx.x, head = blockIdx.y, b = blockIdx.z;
  if (t >= tokens) return;
  const int position = t + (retired ? retired[b] * CHUNK : 0);
  score[(int64_t(b) * gridDim.y + head) * tokens + t] = position_score(router, head, position);
}

// What the keys of a chunk and the one before receive from the chunk's queries, summed over the group: `partial` [B, K, C, 128].
// One block a (sequence, KV head, chunk), a warp 16 queries, one query head after the other.
template <class K>
__global__ void __launch_bounds__(128) receive(Rows<const typename K::T> q, Rows<const typename K::T> k, const Span span, float* partial,
                                               int tokens, int kv_heads, int group) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = 16;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ float sums[4][RING];
  const Tile<P, RING, D> keys{shared_address(memory)};
  const Tile<P, CHUNK, D> queries{keys.base + keys.BYTES};
  const int chunk = blockIdx.x, head = blockIdx.y, b = blockIdx.z, start = chunk * CHUNK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  load_matrix<128, CHUNK>(keys, 0, k.row(b, head, max(start - CHUNK, 0)), k.token, chunk > 0 ? CHUNK : 0);
  load_matrix<128, CHUNK>(keys, CHUNK, k.row(b, head, start), k.token, tokens - start);
  float received[NT][2];
#pragma unroll
  for (int n = 0; n < NT; n++) received[n][0] = received[n][1] = 0.f;
  const float scale = rsqrtf(float(D)) * LOG2E;
  for (int g = 0; g < group; g++) {
    __syncthreads();
    load_matrix<128, CHUNK>(queries, 0, q.row(b, head * group + g, start), q.token, tokens - start);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    Left<P> a[KS];
#pragma unroll
    for (int i = 0; i < KS; i++) load_left(a[i], queries, warp * 16, i * 16);
    float s[NT][4];
    clear(s);
    product_nt<KS, NT>(s, a, keys, 0);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp * 16 + lane / 4 + half * 8;  // its own key: column 64 + row
      float m = -INFINITY, sum = 0.f;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int column = n * 8 + lane % 4 * 2 + e;
          float& x = s[n][half * 2 + e];
          x = column <= CHUNK + row && (chunk > 0 || column >= CHUNK) ? x * scale : -INFINITY;
          m = fmaxf(m, x);
        }
      m = row_max(m);
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[n][half * 2 + e];
          x = exp2f(x - m);
          sum += x;
        }
      sum = row_sum(sum);
      const float share = span.has(b, start + row, tokens) ? 1.f / sum : 0.f;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (n * 8 + lane % 4 * 2 + e < CHUNK + row) received[n][e] += s[n][half * 2 + e] * share;
    }
  }
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float x = received[n][e];
      for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
      if (lane < 4) sums[warp][n * 8 + lane * 2 + e] = x;
    }
  __syncthreads();
  const int64_t to = ((int64_t(b) * kv_heads + head) * gridDim.x + chunk) * RING + threadIdx.x;
  partial[to] = sums[0][threadIdx.x] + sums[1][threadIdx.x] + sums[2][threadIdx.x] + sums[3][threadIdx.x];
}

// A token's two sums, and what the ring had, to a mean.
__global__ void __launch_bounds__(CHUNK) add_received(const float* partial, const Span span, const int32_t* retired, const float* in_ring,
                                                      float* score, int tokens, int group) {
  const int chunk = blockIdx.x, chunks = gridDim.x, b = blockIdx.z, t = chunk * CHUNK + threadIdx.x;
  if (t >= tokens) return;
  const int64_t row = int64_t(b) * gridDim.y + blockIdx.y;
  const float* own = partial + (row * chunks + chunk) * RING;
  float sum = own[CHUNK + threadIdx.x];
  if (chunk + 1 < chunks) sum += own[RING + threadIdx.x];
  if (span.begin && t < span.begin[b]) sum += in_ring[row * RING + (t + retired[b] * CHUNK) % RING];
  score[row * tokens + t] = received_mean(sum, t, span.end ? span.end[b] : tokens, group);
}

template <class K>
int received_scores(const StillShape& shape, StillRows q, StillRows k, const StillPast* past, const StillDecode* state, float* partial,
                    float* score, StillStream stream) {
  using T = const typename K::T;
  const Span span = past ? Span{past->ring, past->tokens} : Span{};
  const int group = shape.heads / shape.kv_heads;
  const dim3 grid(chunks(shape), shape.kv_heads, shape.batch);
  constexpr int bytes = Tile<K::P, RING, K::D>::BYTES + Tile<K::P, CHUNK, K::D>::BYTES;
  int error = launch(receive<K>, grid, 128, bytes, stream, Rows<T>(q), Rows<T>(k), span, partial, int(shape.tokens), int(shape.kv_heads), group);
  if (error) return error;
  return launch(add_received, grid, CHUNK, 0, stream, static_cast<const float*>(partial), span, past ? past->retired : nullptr,
                state ? static_cast<const float*>(state->ring_score) : nullptr, score, int(shape.tokens), group);
}

}  // namespace still

extern "C" int still_scores(const StillShape* shape, const StillRouter* router, StillRows q, StillRows k, const StillPast* past,
                            const StillDecode* state, float* partial, float* score, StillStream stream) {
  using namespace still;
  switch (router->kind) {
    case STILL_SELF_SALIENCY: return still_saliency(shape, q, k, score, stream);
    case STILL_SELF_RECALL: return cudaSuccess;
    case STILL_RECEIVED_ATTENTION:
      return dispatch_forward(*shape, [&](auto kind) { return received_scores<decltype(kind)>(*shape, q, k, past, state, partial, score, stream); });
    default: {
      if (!valid(*shape)) return cudaErrorInvalidValue;
      const dim3 grid((shape->tokens + 255) / 256, shape->kv_heads, shape->batch);
      return launch(position_scores, grid, 256, 0, stream, *router, past ? past->retired : nullptr, score, int(shape->tokens));
    }
  }
}
