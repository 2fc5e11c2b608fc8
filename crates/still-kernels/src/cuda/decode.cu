// One token of every sequence. The blocks of one (sequence, KV head): some share the store, one answers from the ring (after
// adding the token to it) and scores the token, two a query head work the halves of the linear branch. Each leaves a partial
// result; the last to arrive merges them in order.
#include "decode.cuh"
#include "wgmma.cuh"

namespace still {

constexpr int GROUP = 16;       // at most so many query heads a KV head: the rows of a product
constexpr int MOST_PARTS = 65;  // of a store, and the ring
static_assert(2 * MOST_PARTS >= RING);

// Sum, or largest, over the block's 128 threads.
template <bool MAX>
__device__ __forceinline__ float over_block(float x, float* four) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    float y = __shfl_xor_sync(0xffffffffu, x, i);
    x = MAX ? fmaxf(x, y) : x + y;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) four[threadIdx.x / 32] = x;
  __syncthreads();
  return MAX ? fmaxf(fmaxf(four[0], four[1]), fmaxf(four[2], four[3])) : four[0] + four[1] + four[2] + four[3];
}

// y[N] = x[M] A, A [M, N] of 16-byte pieces of E elements; y and x in shared memory. All 128 threads call.
template <int M, int N, class E>
__device__ __forceinline__ void row_times_matrix(const float* x, const E* a, float* y) {
  constexpr int WIDE = 16 / sizeof(E), PIECES = N / WIDE, LANES = 128 / PIECES;
  const int piece = threadIdx.x % PIECES, lane = threadIdx.x / PIECES;
  for (int i = threadIdx.x; i < N; i += 128) y[i] = 0.f;
  float sum[WIDE];
#pragma unroll
  for (int e = 0; e < WIDE; e++) sum[e] = 0.f;
  if (lane < LANES)
#pragma unroll 16
    for (int m = lane; m < M; m += LANES) {
      const uint4 raw = *reinterpret_cast<const uint4*>(a + int64_t(m) * N + piece * WIDE);
      const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int w = 0; w < 4; w++) {
        if constexpr (sizeof(E) == 2) {
          float2 v = unpack(word[w]);
          sum[2 * w] += x[m] * v.x;
          sum[2 * w + 1] += x[m] * v.y;
        } else {
          sum[w] += x[m] * __uint_as_float(word[w]);
        }
      }
    }
  for (int turn = 0; turn < LANES; turn++) {  // in order
    __syncthreads();
    if (lane == turn)
#pragma unroll
      for (int e = 0; e < WIDE; e++) y[piece * WIDE + e] += sum[e];
  }
  __syncthreads();
}

// Where block `part` of a (sequence, KV head) leaves its numerators [GROUP, D] and, behind them, maxima and sums [2, GROUP].
template <int D>
__device__ __forceinline__ float* partial_of(float* partial, int64_t bk, int parts, int part) {
  return partial + (bk * parts + part) * GROUP * (D + 2);
}

template <class K>
__global__ void __launch_bounds__(128) decode_attend(const Decode<typename K::T> in) {
  using T = typename K::T;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8;
  using Stage = Tile<P, 128, D>;  // 64 keys, 64 values
  const int b = blockIdx.z, kv = blockIdx.y, part = blockIdx.x, position = in.positions[b];
  if (position < 0) return;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float four[4], x[D], f[D], phi[D], y[D], maxima[4][GROUP], sums[4][GROUP];
  __shared__ bool last;
  const uint32_t base = shared_address(memory);
  float* const floats = reinterpret_cast<float*>(memory);
  float* const window = floats + (2 * Stage::BYTES + Tile<P, 16, D>::BYTES) / 4;  // logits [group, RING]; weights, when merging
  auto stage = [&](int i) { return Stage{base + i % 2 * Stage::BYTES}; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, chunk = position / CHUNK, ring_part = in.splits;
  const int64_t bk = int64_t(b) * in.kv_heads + kv;
  const int retired = max(chunk - 1, 0), kept = kept_tokens(in.cap, in.budgets[kv], retired), absorbed = retired * CHUNK - kept;
  float* mine = partial_of<D>(in.partial, bk, gridDim.x, part);

  if (part <= ring_part) {
    // Tiles of 64 tokens from `begin`: of the store, or the ring's two chunks (the one before, this one).
    const bool ring = part == ring_part;
    const int tiles = (kept + CHUNK - 1) / CHUNK, share = (tiles + in.splits - 1) / in.splits;
    const int begin = ring ? (chunk == 0) : part * share, end = ring ? 2 : min(begin + share, tiles);
    if (ring) {
      const int64_t to = (bk * RING + position % RING) * D;
      if (threadIdx.x < D) {
        in.ring_k[to + threadIdx.x] = in.k.row(b, kv, 0)[threadIdx.x];
        in.ring_v[to + threadIdx.x] = in.v.row(b, kv, 0)[threadIdx.x];
      }
      for (int i = threadIdx.x; i < in.group * RING; i += 128) window[i] = -INFINITY;
      __syncthreads();
    }
    auto valid = [&](int i) { return ring ? (i == 0 ? CHUNK : position % CHUNK + 1) : kept - i * CHUNK; };
    auto load = [&](int i) {
      if (i < end) {
        const int64_t from = ring ? bk * RING + (chunk + 1 + i) % 2 * CHUNK : in.store(b, kv) + int64_t(i) * CHUNK;
        load_matrix<128, CHUNK>(stage(i), 0, (ring ? in.ring_k : in.store_k) + from * D, D, valid(i));
        load_matrix<128, CHUNK>(stage(i), CHUNK, (ring ? in.ring_v : in.store_v) + from * D, D, valid(i));
      }
      copy_commit();
    };
    // The group's queries are the rows of one left operand.
    const Tile<P, 16, D> queries{base + 2 * Stage::BYTES};
    load_matrix<128, 16>(queries, 0, in.q.row(b, kv * in.group, 0), in.q.head, in.group);
    load(begin);
    Left<P> q[KS];
    float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    clear(out);
    const float scale = rsqrtf(float(D)) * LOG2E;
    for (int i = begin; i < end; i++) {
      copy_wait<0>();
      __syncthreads();
      load(i + 1);
      if (i == begin)
#pragma unroll
        for (int k = 0; k < KS; k++) load_left(q[k], queries, 0, k * 16);
      // A warp's 16 keys.
      float s[2][4];
      clear(s);
      product_nt<KS, 2>(s, q, stage(i), warp * 16);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int key = warp * 16 + n * 8 + lane % 4 * 2 + e;
            float& l = s[n][half * 2 + e];
            l = key < valid(i) ? l * scale : -INFINITY;
            if (ring && lane / 4 + half * 8 < in.group) window[(lane / 4 + half * 8) * RING + i * CHUNK + key] = l;
            top = fmaxf(top, l);
          }
        const float raised = fmaxf(m[half], row_max(top));
        const float shrink = raised > -INFINITY ? exp2_fast(m[half] - raised) : 1.f;
        m[half] = raised;
        sum[half] *= shrink;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          out[n][half * 2] *= shrink;
          out[n][half * 2 + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& l = s[n][half * 2 + e];
            l = raised > -INFINITY ? exp2_fast(l - raised) : 0.f;
            sum[half] += l;
          }
      }
      Left<P> p[1];
      to_left(p[0], s[0], s[1]);
      product_nn<1, NT>(out, p, stage(i), CHUNK + warp * 16);
    }
    // Four warps to one: brought to the block's maximum, added in order.
    const float row_sums[2] = {row_sum(sum[0]), row_sum(sum[1])};
    if (lane % 4 == 0)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        maxima[warp][lane / 4 + half * 8] = m[half];
        sums[warp][lane / 4 + half * 8] = row_sums[half];
      }
    __syncthreads();
    float* numerators = floats;  // the stages are done with
    for (int i = threadIdx.x; i < GROUP * D; i += 128) numerators[i] = 0.f;
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane / 4 + half * 8;
      top[half] = fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row]));
    }
    for (int turn = 0; turn < 4; turn++) {
      __syncthreads();
      if (warp == turn)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float weight = m[half] > -INFINITY ? exp2f(m[half] - top[half]) : 0.f;
          float* to = numerators + (lane / 4 + half * 8) * D + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < NT; n++) {
            to[n * 8] += out[n][half * 2] * weight;
            to[n * 8 + 1] += out[n][half * 2 + 1] * weight;
          }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < in.group * D; i += 128) mine[i] = numerators[i];
    if (threadIdx.x < in.group) {
      const int row = threadIdx.x;
      const float m = fmaxf(fmaxf(maxima[0][row], maxima[1][row]), fmaxf(maxima[2][row], maxima[3][row]));
      float all = 0.f;
      for (int w = 0; w < 4; w++) all += maxima[w][row] > -INFINITY ? sums[w][row] * exp2f(maxima[w][row] - m) : 0.f;
      mine[GROUP * D + row] = m;
      mine[GROUP * (D + 1) + row] = all;
    }
  } else {
    // Half of phi(q) S and phi(q) z of one query head, times lambda. The state's half comes while phi is made.
    const int g = (part - ring_part - 1) / 2, head = kv * in.group + g;
    const bool plus = part % 2 == (ring_part + 1) % 2;
    if (absorbed > 0) {
      static_assert(2 * Stage::BYTES >= D * D * 4);
      const float* s = in.s + (bk * 2 + !plus) * D * D;
      for (int i = threadIdx.x; i < D * D / 4; i += 128) copy_async(base + i * 16, s + i * 4, true);
      copy_commit();
      const float lambda = in.log_scale ? expf(in.log_scale[head]) / absorbed : 1.f;
      const bool on = threadIdx.x < D;
      const float own = on ? float(in.q.row(b, head, 0)[threadIdx.x]) : 0.f;
      const float z = on ? in.z[(bk * 2 + !plus) * D + threadIdx.x] : 0.f;
      if (on) x[threadIdx.x] = own;
      __syncthreads();
      row_times_matrix<D, D>(x, in.w_q + int64_t(head) * D * D, f);
      const float value = on ? f[threadIdx.x] : 0.f;
      const float squared = over_block<false>(own * own, four), norm = sqrtf(over_block<false>(value * value, four));
      const float u = value * (sqrtf(squared) / fmaxf(norm, 1e-12f)) * (plus ? LOG2E : -LOG2E);
      const float top = over_block<true>(on ? u : -INFINITY, four), e = on ? exp2f(u - top) : 0.f;
      const float share = lambda * e / over_block<false>(e, four);
      if (on) phi[threadIdx.x] = share;
      const float den = over_block<false>(share * z, four);
      copy_wait<0>();
      __syncthreads();
      row_times_matrix<D, D>(phi, static_cast<const float*>(floats), y);
      if (on) mine[threadIdx.x] = y[threadIdx.x];
      if (threadIdx.x == 0) mine[GROUP * D] = den;
    } else {
      if (threadIdx.x < D) mine[threadIdx.x] = 0.f;
      if (threadIdx.x == 0) mine[GROUP * D] = 0.f;
    }
  }

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(in.arrived + bk, gridDim.x - 1) == gridDim.x - 1;
  if (part == ring_part) {
    // The score: over the last 64 tokens, which end at column 64 + position % 64; a warp takes every fourth head.
    const int self = CHUNK + position % CHUNK;
    float total = 0.f;
    for (int g = warp; g < in.group; g += 4) {
      const float *logits = window + g * RING + self, a = logits[-lane], c = logits[-lane - 32], own_logit = logits[0];
      float m = fmaxf(a, c);
      for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, i));
      float rest = (lane == 0 ? 0.f : exp2f(a - m)) + exp2f(c - m);
      for (int i = 16; i > 0; i /= 2) rest += __shfl_xor_sync(0xffffffffu, rest, i);
      const float own = exp2f(own_logit - m), all = rest + own, p = own / all, r = rest / all;
      total += (r > 0.f ? r * logf(r) : 0.f) + p * log1pf(p * 1e8f);
    }
    if (lane == 0) four[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) in.ring_score[bk * RING + position % RING] = (four[0] + four[1] + four[2] + four[3]) / in.group;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  // Weights of the ring's share and of the splits that had work, then the sums, all heads at once.
  const int tiles = (kept + CHUNK - 1) / CHUNK, share = (tiles + in.splits - 1) / in.splits;
  const int used = (share > 0 ? (tiles + share - 1) / share : 0) + 1;
  float *weights = window, *shares = weights + in.group * MOST_PARTS;  // [group, used]
  auto of = [&](int p) { return partial_of<D>(in.partial, bk, gridDim.x, p == used - 1 ? ring_part : p); };
  auto linear = [&](int p) { return partial_of<D>(in.partial, bk, gridDim.x, ring_part + 1 + p); };
  for (int i = threadIdx.x; i < in.group * used; i += 128) {
    const float* from = of(i % used) + GROUP * D + i / used;
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
    sums[0][g] = 1.f / den;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < in.group * D; i += 128) {
    const int g = i / D, d = i % D;
    float num = (linear(2 * g)[d] + linear(2 * g + 1)[d]) * sums[0][g];
#pragma unroll 8
    for (int p = 0; p < used; p++) num += of(p)[i] * weights[g * MOST_PARTS + p];
    in.out.row(b, kv * in.group + g, 0)[d] = T(num);
  }
}

// Rows of a sequence that was read at once: salient ones to the store, the last two chunks to the ring.
template <class T>
__global__ void __launch_bounds__(128) decode_fill(Rows<const T> k, Rows<const T> v, const float* score, const StillRouting routing,
                                                   const Decode<T> in, int tokens, int d) {
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
    if (threadIdx.x == 0 && !store) in.ring_score[to] = score[bk * tokens + t];
    if (threadIdx.x == 0 && store && in.store_score) {
      in.store_score[to] = score[bk * tokens + t];
      in.store_token[to] = t;
    }
  }
}

int run_decode_admit(const StillShape&, const StillDecode&, StillStream);
int run_decode_retire(const StillShape&, const StillDecode&, StillStream);

}  // namespace still

extern "C" int64_t still_decode_floats(const StillShape* shape, int32_t splits) {
  const int group = shape->heads / shape->kv_heads;
  return int64_t(shape->batch) * shape->kv_heads * (splits + 1 + 2 * group) * still::GROUP * (shape->head_dim + 2);
}

extern "C" int still_decode(const StillShape* shape, const StillDecode* args, StillStream stream) {
  if (!still::valid(*shape) || shape->heads / shape->kv_heads > still::GROUP || args->splits < 1 || args->splits > 64) return cudaErrorInvalidValue;
  if (args->cap != STILL_NO_CAP)
    if (int error = still::run_decode_admit(*shape, *args, stream)) return error;
  if (int error = still::run_decode_retire(*shape, *args, stream)) return error;
  return still::dispatch(*shape, [&](auto kind) {
    using K = decltype(kind);
    const int group = shape->heads / shape->kv_heads, parts = args->splits + 1 + 2 * group;
    const int bytes = 2 * still::Tile<K::P, 128, K::D>::BYTES + still::Tile<K::P, 16, K::D>::BYTES + group * 2 * still::MOST_PARTS * 4;
    return still::launch(still::decode_attend<K>, dim3(parts, shape->kv_heads, shape->batch), 128, bytes, stream,
                         still::Decode<typename K::T>(*shape, *args));
  });
}

extern "C" int still_decode_fill(const StillShape* shape, StillRows k, StillRows v, const float* score, const StillRouting* routing,
                                 const StillDecode* args, StillStream stream) {
  return still::dispatch(*shape, [&](auto kind) {
    using T = typename decltype(kind)::T;
    return still::launch(still::decode_fill<T>, dim3(128, shape->kv_heads, shape->batch), 128, 0, stream, still::Rows<const T>(k),
                         still::Rows<const T>(v), score, *routing, still::Decode<T>(*shape, *args), shape->tokens, shape->head_dim);
  });
}
