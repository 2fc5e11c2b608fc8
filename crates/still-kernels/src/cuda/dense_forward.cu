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

// A block's two times 64 queries, and those of the thread's warpgroup.
template <class T>
struct ForwardBlock {
  int b, kv, first_head, first_chunk;
  int start, length;  // tokens that the sequence had before; new ones, with padding behind them
  int group;          // which warpgroup: 0 or 1
  int head, from;     // its head; its first query
  int row;            // the thread's first of two, 8 apart

  __device__ __forceinline__ explicit ForwardBlock(const DenseForward<T>& in)
      : b(blockIdx.z), first_head(in.two_heads ? blockIdx.x * 2 : blockIdx.x), start(in.starts ? in.starts[b] : 0),
        length(in.lengths ? in.lengths[b] : in.tokens), group(threadIdx.x / 128), row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4) {
    const int last_block = gridDim.y - 1 - blockIdx.y;  // the longest first
    kv = first_head / in.group;
    first_chunk = in.two_heads ? last_block : last_block * 2;
    head = first_head + (in.two_heads ? group : 0);
    from = (first_chunk + (in.two_heads ? 0 : group)) * CHUNK;
  }
  // The query of the thread's row `half`.
  __device__ __forceinline__ int token(int half) const { return from + row + half * 8; }
  // Tokens that the block's last query sees.
  __device__ __forceinline__ int end(bool two_heads) const { return start + min(length, (first_chunk + (two_heads ? 1 : 2)) * CHUNK); }

  template <class TILE>
  __device__ __forceinline__ void load_queries(TILE to, const DenseForward<T>& in) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int t = (first_chunk + (in.two_heads ? 0 : i)) * CHUNK;
      load_matrix<FORWARD_THREADS, CHUNK>(to, i * CHUNK, in.q.row(b, first_head + (in.two_heads ? i : 0), t), in.q.token, length - t);
    }
  }
  // Outputs, `factor(half)` times the sums.
  template <int NT, class Factor>
  __device__ __forceinline__ void leave(const DenseForward<T>& in, const float (&sums)[NT][4], Factor factor) const {
#pragma unroll
    for (int half = 0; half < 2; half++) store_row(token(half) < in.tokens, in.out.row(b, head, token(half)), sums, half, factor(half));
  }
};

// Keys and values of a KV head on their way through the stages of shared memory, in tiles of KEYS.
template <class K, int KEYS>
struct KeyStages {
  using T = typename K::T;
  using Keys = typename DenseTiles<K, KEYS>::Keys;
  static constexpr int STAGES = DenseTiles<K, KEYS>::STAGES;
  const DenseForward<T>& in;
  int b, kv, end, tiles;
  uint32_t base;

  __device__ __forceinline__ Keys stage(int i) const { return Keys{base + i * Keys::BYTES}; }
  __device__ __forceinline__ Keys keys(int i) const { return stage(i % STAGES); }
  __device__ __forceinline__ Keys values(int i) const { return stage(STAGES + i % STAGES); }
  __device__ __forceinline__ void load(Keys to, const Rows<const T>& rows, int i) const {
    if (i < tiles) load_matrix<FORWARD_THREADS, KEYS>(to, 0, rows.row(b, kv, int64_t(i) * KEYS), rows.token, end - i * KEYS);
  }
  // A tile's keys, and the values of the tile before, which are needed when they are.
  __device__ __forceinline__ void fetch(int i) const {
    load(keys(i), in.keys, i);
    load(values(i - 1), in.values, i - 1);
    copy_commit();
  }
};

// Logits of tile i become weights, the left operands of the product with its values.
template <int KEYS, class T, int P, int NT>
__device__ __forceinline__ void weigh_tile(const ForwardBlock<T>& at, int i, float scale, float (&s)[KEYS / 8][4], OnlineSoftmax<NT>& mine,
                                           Left<P> (&p)[KEYS / 16]) {
  if (i * KEYS + KEYS - 1 > at.start + at.from) {
    const int seen = at.start + at.from + at.row - i * KEYS;  // the last column that the first row sees; the second sees 8 more
    each_sum(s, [&](float& x, int half, int column) {
      if (column - half * 8 > seen) x = -INFINITY;
    });
  }
  weigh(mine, s, scale, [](int, float, bool) {});
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++) to_left(p[k], s[2 * k], s[2 * k + 1]);
}

template <class K, int KEYS>
__global__ void __launch_bounds__(FORWARD_THREADS, DenseTiles<K, KEYS>::BLOCKS) dense_forward(const DenseForward<typename K::T> in) {
  using Tiles = DenseTiles<K, KEYS>;
  constexpr int D = K::D, P = K::P, KS = D / 16, NT = D / 8, STAGES = Tiles::STAGES;
  extern __shared__ unsigned char memory[];
  const typename Tiles::Queries queries{aligned(memory)};
  const ForwardBlock<typename K::T> at(in);

  OnlineSoftmax<NT> mine;
  clear(mine.out);
  if (at.first_chunk * CHUNK >= at.length) return at.leave(in, mine.out, [](int) { return 0.f; });  // padding alone
  const int end = at.end(in.two_heads), tiles = (end + KEYS - 1) / KEYS;
  const KeyStages<K, KEYS> stages{in, at.b, at.kv, end, tiles, queries.base + Tiles::Queries::BYTES};
  at.load_queries(queries, in);
  stages.load(stages.keys(0), in.keys, 0);
  copy_commit();
#pragma unroll
  for (int i = 1; i < STAGES; i++) stages.fetch(i);

  const float scale = rsqrtf(float(D)) * LOG2E;
  float s[KEYS / 8][4];
  Left<P> p[KEYS / 16];
  auto weigh_logits = [&](int i) { weigh_tile<KEYS>(at, i, scale, s, mine, p); };
  auto add_values = [&](int i) {
    if constexpr (P == 1) start_add_product<KEYS / 16>(mine.out, p, stages.values(i), 0);
    else product_nn<KEYS / 16, NT>(mine.out, p, stages.values(i), 0);
  };
  auto finish_all = [&] {
    finish<P, D>();
    hold_sums(s);
    hold_sums(mine.out);
    hold_left(p);
  };

  // A tile's keys arrive with the values of the tile before.
  copy_wait<STAGES - 1>();
  publish();
  __syncthreads();
  tile_product<KS>(s, queries, at.group * CHUNK, stages.keys(0), 0);
  if (at.group == 0) weigh_logits(0);
  for (int i = 1; i < tiles; i++) {
    copy_wait<STAGES - 2>();
    publish();
    __syncthreads();
    if (at.group == 1) {
      stages.fetch(i + STAGES - 1);
      weigh_logits(i - 1);
    }
    start_tile_product<KS>(s, queries, at.group * CHUNK, stages.keys(i), 0);
    add_values(i - 1);
    if (at.group == 0) stages.fetch(i + STAGES - 1);
    finish_all();
    if (at.group == 0) weigh_logits(i);
  }
  copy_wait<0>();
  publish();
  __syncthreads();
  if (at.group == 1) weigh_logits(tiles - 1);
  add_values(tiles - 1);
  finish_all();

  float all[2];
#pragma unroll
  for (int half = 0; half < 2; half++) all[half] = row_sum(mine.sum[half]);
  at.leave(in, mine.out, [&](int half) { return at.token(half) < at.length ? 1.f / all[half] : 0.f; });
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
