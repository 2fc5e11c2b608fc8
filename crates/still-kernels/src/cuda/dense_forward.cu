// Dense attention of many tokens of every sequence onto a cache that has their keys and values.
//
// A block answers two times 64 queries, a warpgroup each: of two heads of a group, or, where the group is odd, of two chunks of
// one. Keys and values stream through stages, which are filled one or two tiles ahead. The warpgroups take turns: while one
// turns a tile's logits into weights, the other's products run.
#include "dense.cuh"
#include "online_softmax.cuh"
#include "wgmma.cuh"

namespace still {

constexpr int FORWARD_THREADS = 256;

template <class T>
struct DenseForward {
  Rows<const T> q, keys, values;
  Rows<T> out;
  const int32_t *starts, *lengths;
  int tokens, heads, group;
  bool two_heads;  // of one chunk; or two chunks of one head

  DenseForward(const StillShape& shape, const StillDenseForward& a)
      : q(a.q), keys(a.cache_k), values(a.cache_v), out(a.out), starts(a.starts), lengths(a.lengths), tokens(shape.tokens),
        heads(shape.heads), group(shape.heads / shape.kv_heads), two_heads(group % 2 == 0) {}
};

// Keys of a tile: as many as registers (logits and outputs) have room for.
template <class K>
constexpr int DENSE_KEYS = K::P == 1 && K::D > 64 && K::D <= 128 ? 128 : 64;
// As few as smaller GPUs have shared memory for.
template <class K>
constexpr int FEWEST_KEYS = K::D > 128 ? 32 : 64;

template <class K, int KEYS>
struct DenseTiles {
  // Blocks of a multiprocessor.
  static constexpr int BLOCKS = K::P == 1 && K::D == 64 ? 2 : 1;
  // Of keys, and of values. A third fills what a Hopper block has of shared memory.
  static constexpr int STAGES = K::P == 1 && (K::D == 64 || KEYS == 128) ? 3 : 2;
  using Queries = Tile<K::P, 2 * CHUNK, K::D>;
  using Keys = Tile<K::P, KEYS, K::D>;
  static constexpr int BYTES = Queries::BYTES + 2 * STAGES * Keys::BYTES + ALIGNMENT;
};

// Keeps the operands of a product that runs on in their registers until here.
template <int P, int N>
__device__ __forceinline__ void hold_left(Left<P> (&x)[N]) {
#if STILL_HOPPER
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int p = 0; p < P; p++)
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("" : "+r"(x[n].r[p][i])::"memory");
#endif
}

template <class K, int KEYS>
__global__ void __launch_bounds__(FORWARD_THREADS, DenseTiles<K, KEYS>::BLOCKS) dense_forward(const DenseForward<typename K::T> in) {
  using Tiles = DenseTiles<K, KEYS>;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, STAGES = Tiles::STAGES;
  extern __shared__ unsigned char memory[];
  const typename Tiles::Queries queries{aligned(memory)};
  auto stage = [&](int i) { return typename Tiles::Keys{queries.base + Tiles::Queries::BYTES + i * Tiles::Keys::BYTES}; };
  auto key_tile = [&](int i) { return stage(i % STAGES); };
  auto value_tile = [&](int i) { return stage(STAGES + i % STAGES); };

  const int b = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, half_of_block = warp / 4;
  const int first_head = in.two_heads ? blockIdx.x * 2 : blockIdx.x, kv = first_head / in.group;
  const int last_block = gridDim.y - 1 - blockIdx.y;  // the longest first
  const int first_chunk = in.two_heads ? last_block : last_block * 2;
  const int start = in.starts ? in.starts[b] : 0, length = in.lengths ? in.lengths[b] : in.tokens;
  const int head = first_head + (in.two_heads ? half_of_block : 0);
  const int from = (first_chunk + (in.two_heads ? 0 : half_of_block)) * CHUNK;  // this warpgroup's first query
  const int row = warp % 4 * 16 + lane / 4;                                    // this lane's first of two, 8 apart

  float out[NT][4], m[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};  // m in base 2
  clear(out);
  if (first_chunk * CHUNK >= length) {  // padding alone
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int t = from + row + half * 8;
      store_row(t < in.tokens, in.out.row(b, head, t), out, half, 0.f);
    }
    return;
  }
  const int last_chunk = first_chunk + (in.two_heads ? 1 : 2), end = start + min(length, last_chunk * CHUNK);
  const int tiles = (end + KEYS - 1) / KEYS;
  auto load = [&](typename Tiles::Keys to, const Rows<const typename K::T>& rows, int i) {
    if (i < tiles) load_matrix<FORWARD_THREADS, KEYS>(to, 0, rows.row(b, kv, int64_t(i) * KEYS), rows.token, end - i * KEYS);
  };
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = (first_chunk + (in.two_heads ? 0 : i)) * CHUNK;
    load_matrix<FORWARD_THREADS, CHUNK>(queries, i * CHUNK, in.q.row(b, first_head + (in.two_heads ? i : 0), t), in.q.token, length - t);
  }
  load(key_tile(0), in.keys, 0);
  copy_commit();
#pragma unroll
  for (int i = 1; i < STAGES; i++) {
    load(key_tile(i), in.keys, i);
    load(value_tile(i - 1), in.values, i - 1);
    copy_commit();
  }

  const float scale = rsqrtf(float(D)) * LOG2E;
  float s[KEYS / 8][4];
  Left<P> p[KEYS / 16];
  // Logits of tile i to weights, the left operands of the product with its values.
  auto weigh = [&](int i) {
    const int position = start + from + row;
    if (i * KEYS + KEYS - 1 > start + from) {
#pragma unroll
      for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (i * KEYS + n * 8 + lane % 4 * 2 + e % 2 > position + e / 2 * 8) s[n][e] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float raised = fmaxf(m[half], row_top(s, half) * scale);
      rescale(out, sum[half], half, exp2_fast(m[half] - raised));
      m[half] = raised;
      add_weights(s, sum[half], half, [&](float x) { return exp2_fast(x * scale - raised); });
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
  };
  // Fills the stages that the tile before `i` has left.
  auto fetch = [&](int i) {
    load(key_tile(i + STAGES - 1), in.keys, i + STAGES - 1);
    load(value_tile(i + STAGES - 2), in.values, i + STAGES - 2);
    copy_commit();
  };
  auto add_values = [&](int i) {
    if constexpr (P == 1) start_add_product<KEYS / 16>(out, p, value_tile(i), 0);
    else product_nn<KEYS / 16, NT>(out, p, value_tile(i), 0);
  };
  auto finish_all = [&] {
    finish<P, D>();
    hold_sums(s);
    hold_sums(out);
    hold_left(p);
  };

  // A tile's keys arrive with the values of the tile before.
  copy_wait<STAGES - 1>();
  publish();
  __syncthreads();
  tile_product<KS>(s, queries, half_of_block * CHUNK, key_tile(0), 0);
  if (half_of_block == 0) weigh(0);
  for (int i = 1; i < tiles; i++) {
    copy_wait<STAGES - 2>();
    publish();
    __syncthreads();
    if (half_of_block == 1) {
      fetch(i);
      weigh(i - 1);
    }
    start_tile_product<KS>(s, queries, half_of_block * CHUNK, key_tile(i), 0);
    add_values(i - 1);
    if (half_of_block == 0) fetch(i);
    finish_all();
    if (half_of_block == 0) weigh(i);
  }
  copy_wait<0>();
  publish();
  __syncthreads();
  if (half_of_block == 1) weigh(tiles - 1);
  add_values(tiles - 1);
  finish_all();

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = from + row + half * 8;
    const float all = row_sum(sum[half]);
    store_row(t < in.tokens, in.out.row(b, head, t), out, half, t < length ? 1.f / all : 0.f);
  }
}

}  // namespace still

extern "C" int still_dense_forward(const StillShape* shape, const StillDenseForward* args, StillStream stream) {
  return still::dense_dispatch(*shape, [&](auto kind) -> int {
    using K = decltype(kind);
    if constexpr (K::P == 2 && K::D > 128) {
      return cudaErrorInvalidValue;  // the queries alone would take 128 KiB
    } else {
      const still::DenseForward<typename K::T> in(*shape, *args);
      const int chunks = still::chunks(*shape);
      const dim3 grid(in.two_heads ? shape->heads / 2 : shape->heads, in.two_heads ? chunks : (chunks + 1) / 2, shape->batch);
      auto run = [&](auto keys) {
        constexpr int KEYS = decltype(keys)::value;
        return still::launch(still::dense_forward<K, KEYS>, grid, still::FORWARD_THREADS, still::DenseTiles<K, KEYS>::BYTES, stream, in);
      };
      constexpr int most = still::DENSE_KEYS<K>, fewest = still::FEWEST_KEYS<K>;
      if constexpr (most > fewest) {
        int device = 0, room = 0;
        if (int error = cudaGetDevice(&device)) return error;
        if (int error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
        if (room < still::DenseTiles<K, most>::BYTES) return run(std::integral_constant<int, fewest>{});
      }
      return run(std::integral_constant<int, most>{});
    }
  });
}
