// products_probe: steps of the 8B shape's products, by kernel. Weights of 32 layers, random; graphs, medians of replays.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>
#include "streamed.cuh"

using namespace still;
#define CHECK(x) do { cudaError_t e_ = cudaError_t(x); if (e_ != cudaSuccess) { printf("%s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); exit(1); } } while (0)

__device__ uint32_t hash(uint64_t x) {
  x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; x ^= x >> 33;
  return uint32_t(x);
}
__global__ void fill_words(uint32_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) to[i] = hash(i + seed);
}
// Two halves near 2^-9 (f16) each.
__global__ void fill_scales(uint32_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) to[i] = 0x04000400u | (hash(i + seed) & 0x03ff03ffu);
}
__global__ void fill_bf16(__nv_bfloat16* to, int64_t count, uint64_t seed, float size) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = __float2bfloat16((hash(i + seed) / 2147483648.f - 1.f) * size);
}
// In attention's place: so many nanoseconds in few warps, with a prefetch if there is one.
__global__ void pause(int ns, const void* next, int64_t bytes) {
  let_next();
  wait_before();
  if (bytes) prefetch_next(next, bytes);
  const long long from = clock64();
  while (clock64() - from < ns * 1.755f) {}
}
__global__ void read_all(const uint4* from, int64_t count, uint32_t* to) {
  uint32_t sum = 0;
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (; i + 7 * step < count; i += 8 * step) {
    uint4 x[8];
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
  }
  if (sum == 12345) to[0] = sum;
}

struct Matrix {
  int out, inner;
  void* q8;
  void* bf16;
  int64_t bytes(bool quantized) const { return quantized ? matrix_words<Q8_0>(out, inner) * 4 : int64_t(out) * inner * 2; }
};
static Matrix make(int out, int inner, uint64_t seed, bool dense) {
  Matrix m{out, inner, nullptr, nullptr};
  CHECK(cudaMalloc(&m.q8, m.bytes(true)));
  const int64_t codes = int64_t(row_tiles(out)) * column_tiles(inner) * Q8_0::CODES, all = m.bytes(true) / 4;
  fill_words<<<1024, 256>>>(static_cast<uint32_t*>(m.q8), codes, seed);
  fill_scales<<<1024, 256>>>(static_cast<uint32_t*>(m.q8) + codes, all - codes, seed * 7);
  if (dense) {
    CHECK(cudaMalloc(&m.bf16, m.bytes(false)));
    fill_bf16<<<1024, 256>>>(static_cast<__nv_bfloat16*>(m.bf16), int64_t(out) * inner, seed, 0.03f);
  }
  return m;
}
struct LayerWeights { Matrix q, k, v, o, gate, up, down; };

struct Variant {
  const char* name;
  int kind;  // 0: bf16, 1: the present q8_0, 2: streamed
  int loader, warps, slots, blocks;
  bool pdl;
  int64_t prefetch;        // bytes of the next product
  int64_t pause_prefetch;  // by the pause
};

static int sms;
static cudaStream_t on;

template <class F, bool GATED, int WARPS, int SLOTS, int LOADER>
static int run_streamed(const Products& products, StreamPlan plan, int blocks, bool pdl) {
  constexpr int TILES = GATED ? 2 : 1;
  const auto& a = products.all;
  plan.groups = 0;
  for (int i = 0; i < (GATED ? 1 : a.count); i++) plan.groups += row_tiles(products.factor[i].out);
  plan.planes = a.norm && a.rows <= 4 ? 2 : 1;
  plan.base = BASE;
  plan.x_bytes = column_tiles(a.inner) * 2 * a.rows * plan.planes * 64;
  const int grid = std::min(plan.groups, sms * blocks), most = (plan.groups + grid - 1) / grid;
  const int ring = LOADER == REGISTERS ? 0 : WARPS * SLOTS * TILES * Slot<F>::BYTES, of_group = TILES * WARPS * TILE_ROWS * a.rows * 4;
  const int room = 225 * 1024 / blocks - ring - plan.x_bytes - 2048;
  if (room < of_group) return cudaErrorInvalidValue;
  plan.round = std::min(most, room / of_group);
  const int bytes = ring + plan.x_bytes + plan.round * of_group;
  auto kernel = streamed_products<F, GATED, WARPS, SLOTS, LOADER>;
  CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = WARPS * 32, config.dynamicSmemBytes = bytes, config.stream = on;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, products, plan);
}

template <bool GATED>
static int by_variant(const Variant& v, const Products& products, const StreamPlan& plan) {
#define CASE(L, W, S) if (v.loader == L && v.warps == W && v.slots == S) return run_streamed<Q8_0, GATED, W, (GATED ? S / 2 : S), L>(products, plan, v.blocks, v.pdl);
  CASE(REGISTERS, 16, 4) CASE(REGISTERS, 8, 4)
  CASE(ASYNC, 16, 4) CASE(ASYNC, 16, 6) CASE(ASYNC, 16, 8) CASE(ASYNC, 8, 8) CASE(ASYNC, 8, 4)
  CASE(BULK, 16, 4) CASE(BULK, 16, 8) CASE(BULK, 8, 8) CASE(BULK, 8, 4)
#undef CASE
  return cudaErrorInvalidValue;
}

static void product(const Variant& v, std::vector<const Matrix*> matrices, bool gated, int rows, const void* x, const void* norm, const void* add, std::vector<void*> to,
                    int to_dtype, const Matrix* next) {
  Products p = {};
  p.all = {STILL_BF16, STILL_BF16, to_dtype, rows, matrices[0]->inner, int(matrices.size()), gated, 1e-5f, x, norm};
  for (size_t i = 0; i < matrices.size(); i++) {
    StillFactor f = {};
    f.out = matrices[i]->out;
    f.format = v.kind == 0 ? STILL_PLAIN : STILL_Q8_0;
    f.weight = v.kind == 0 ? matrices[i]->bf16 : matrices[i]->q8;
    f.add = add;
    f.to = i < to.size() ? to[i] : nullptr;
    p.factor[i] = f;
  }
  if (v.kind < 2) {
    CHECK(still_small_batch_products(&p.all, p.factor, on));
    return;
  }
  StreamPlan plan = {};
  if (next && v.prefetch) plan.next = next->q8, plan.next_bytes = std::min(v.prefetch, next->bytes(true));
  CHECK(gated ? by_variant<true>(v, p, plan) : by_variant<false>(v, p, plan));
}

static float time_graph(const std::function<void()>& queue, int replays) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  queue();
  CHECK(cudaStreamSynchronize(on));
  CHECK(cudaStreamBeginCapture(on, cudaStreamCaptureModeRelaxed));
  queue();
  CHECK(cudaStreamEndCapture(on, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t from, to;
  cudaEventCreate(&from), cudaEventCreate(&to);
  std::vector<float> times;
  for (int i = 0; i < replays + 2; i++) {
    CHECK(cudaEventRecord(from, on));
    CHECK(cudaGraphLaunch(exec, on));
    CHECK(cudaEventRecord(to, on));
    CHECK(cudaStreamSynchronize(on));
    float ms;
    cudaEventElapsedTime(&ms, from, to);
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaEventDestroy(from), cudaEventDestroy(to);
  return times[times.size() / 2];
}

int main(int argc, char** argv) {
  const int layers = 32, replays = argc > 1 ? atoi(argv[1]) : 11;
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  sms = device.multiProcessorCount;
  CHECK(cudaStreamCreate(&on));
  printf("%s, %d multiprocessors, L2 %d MB\n", device.name, sms, device.l2CacheSize >> 20);
  std::vector<LayerWeights> all(layers);
  uint64_t seed = 1;
  for (auto& l : all) {
    l.q = make(4096, 4096, seed++ << 40, true), l.k = make(1024, 4096, seed++ << 40, true), l.v = make(1024, 4096, seed++ << 40, true);
    l.o = make(4096, 4096, seed++ << 40, true), l.gate = make(14336, 4096, seed++ << 40, true), l.up = make(14336, 4096, seed++ << 40, true);
    l.down = make(4096, 14336, seed++ << 40, true);
  }
  Matrix vocab = make(128256, 4096, seed++ << 40, true);
  const int MOST = 8;
  __nv_bfloat16 *x, *norm, *q, *k, *v_, *hidden, *mid;
  float* logits;
  CHECK(cudaMalloc(&x, MOST * 4096 * 2)); CHECK(cudaMalloc(&norm, 4096 * 2)); CHECK(cudaMalloc(&q, MOST * 4096 * 2)); CHECK(cudaMalloc(&k, MOST * 1024 * 2));
  CHECK(cudaMalloc(&v_, MOST * 1024 * 2)); CHECK(cudaMalloc(&hidden, MOST * 14336 * 2)); CHECK(cudaMalloc(&mid, MOST * 4096 * 2)); CHECK(cudaMalloc(&logits, MOST * 128256 * 4));
  auto refresh = [&] {
    fill_bf16<<<64, 256, 0, on>>>(x, MOST * 4096, 77ull << 50, 1.f), fill_bf16<<<64, 256, 0, on>>>(norm, 4096, 78ull << 50, 1.f);
    fill_bf16<<<64, 256, 0, on>>>(hidden, MOST * 14336, 79ull << 50, 1.f);
    CHECK(cudaStreamSynchronize(on));
  };
  refresh();
  CHECK(cudaDeviceSynchronize());

  // What reading alone reaches.
  {
    uint32_t* sink;
    CHECK(cudaMalloc(&sink, 4));
    for (int blocks : {2, 4, 8}) {
      const float ms = time_graph([&] { for (auto& l : all) read_all<<<sms * blocks, 512, 0, on>>>(static_cast<const uint4*>(l.gate.bf16), l.gate.bytes(false) / 16, sink); }, replays);
      printf("read 117 MB a kernel, %d blocks of 512 a multiprocessor: %.0f GB/s\n", blocks, layers * all[0].gate.bytes(false) / ms / 1e6);
    }
  }

  const int64_t MB = 1 << 20;
  std::vector<Variant> variants = {
      {"bf16", 0}, {"q8_0 now", 1}, {"q8_0 now, pause prefetches o", 1, 0, 0, 0, 0, false, 0, 32 * MB},
      {"registers 16x4", 2, REGISTERS, 16, 4, 1}, {"registers 8x4 x2", 2, REGISTERS, 8, 4, 2},
      {"async 16x4", 2, ASYNC, 16, 4, 1}, {"async 16x6", 2, ASYNC, 16, 6, 1}, {"async 16x8", 2, ASYNC, 16, 8, 1}, {"async 8x8 x2", 2, ASYNC, 8, 8, 2}, {"async 8x4 x2", 2, ASYNC, 8, 4, 2},
      {"bulk 16x4", 2, BULK, 16, 4, 1}, {"bulk 16x8", 2, BULK, 16, 8, 1}, {"bulk 8x8 x2", 2, BULK, 8, 8, 2}, {"bulk 8x4 x2", 2, BULK, 8, 4, 2},
  };
  const auto base = variants;
  for (const auto& b : base)
    if (b.kind == 2 && (b.slots != 6)) {
      for (int64_t bytes : {8 * MB, 16 * MB}) {
        Variant v = b;
        v.prefetch = bytes;
        if (bytes == 16 * MB) v.pause_prefetch = 32 * MB;
        variants.push_back(v);
      }
      Variant v = b;
      v.pdl = true;
      variants.push_back(v);
      v.prefetch = 8 * MB;
      variants.push_back(v);
    }

  // What each gives, compared with the present kernel.
  for (int rows : {1, 3, 8}) {
    refresh();
    auto run = [&](const Variant& v) {
      std::vector<std::vector<__nv_bfloat16>> out;
      auto& l = all[3];
      auto keep = [&](const void* from, int64_t count) {
        std::vector<__nv_bfloat16> host(count);
        CHECK(cudaMemcpyAsync(host.data(), from, count * 2, cudaMemcpyDeviceToHost, on));
        CHECK(cudaStreamSynchronize(on));
        out.push_back(host);
      };
      for (void* p : {(void*)q, (void*)mid}) CHECK(cudaMemsetAsync(p, 0xff, MOST * 4096 * 2, on));
      product(v, {&l.q, &l.k, &l.v}, false, rows, x, norm, nullptr, {q, k, v_}, STILL_BF16, nullptr);
      keep(q, rows * 4096), keep(k, rows * 1024), keep(v_, rows * 1024);
      product(v, {&l.o}, false, rows, q, nullptr, x, {mid}, STILL_BF16, nullptr);
      keep(mid, rows * 4096);
      product(v, {&l.gate, &l.up}, true, rows, mid, norm, nullptr, {hidden}, STILL_BF16, nullptr);
      keep(hidden, rows * 14336);
      if (rows < 8) {
        product(v, {&l.down}, false, rows, hidden, nullptr, x, {mid}, STILL_BF16, nullptr);
        keep(mid, rows * 4096);
      }
      return out;
    };
    const auto expected = run(variants[1]);
    for (const auto& v : variants) {
      if (v.kind != 2 || v.prefetch || v.pdl) continue;
      if (rows == 8 && v.slots * v.warps * v.blocks > 64 && v.loader != REGISTERS) continue;
      const auto got = run(v);
      printf("rows %d, %s:", rows, v.name);
      for (size_t i = 0; i < got.size(); i++) {
        double error = 0, size = 0;
        for (size_t j = 0; j < got[i].size(); j++) {
          const double e = __bfloat162float(expected[i][j]), g = __bfloat162float(got[i][j]);
          error += (g - e) * (g - e), size += e * e;
        }
        printf(" %.1e", std::sqrt(error / size));
      }
      printf("\n");
    }
  }

  printf("%-28s %4s %6s %6s | %8s %8s | %7s %7s %7s %7s %7s\n", "variant", "pdl", "ahead", "pause", "chain", "+pauses", "qkv us", "o us", "gate us", "down us", "vocab");
  const int rows = argc > 2 ? atoi(argv[2]) : 1;
  auto layer_of = [&](const Variant& v, int n, int pause_ns) {
    auto& l = all[n];
    product(v, {&l.q, &l.k, &l.v}, false, rows, x, norm, nullptr, {q, k, v_}, STILL_BF16, pause_ns && v.pause_prefetch ? nullptr : &l.o);
    if (pause_ns) {
      cudaLaunchConfig_t config = {};
      config.gridDim = 200, config.blockDim = 128, config.stream = on;
      cudaLaunchAttribute attribute;
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      config.attrs = &attribute, config.numAttrs = v.pdl ? 1 : 0;
      CHECK(cudaLaunchKernelEx(&config, pause, pause_ns, static_cast<const void*>(l.o.q8), std::min(v.pause_prefetch, l.o.bytes(true))));
    }
    product(v, {&l.o}, false, rows, q, nullptr, x, {mid}, STILL_BF16, &l.gate);
    product(v, {&l.gate, &l.up}, true, rows, mid, norm, nullptr, {hidden}, STILL_BF16, &l.down);
    product(v, {&l.down}, false, rows, hidden, nullptr, mid, {x}, STILL_BF16, n + 1 < layers ? &all[n + 1].q : &vocab);
  };
  auto head = [&](const Variant& v) { product(v, {&vocab}, false, rows, x, norm, nullptr, {logits}, STILL_F32, nullptr); };
  for (int pass = 0; pass < 2; pass++)
    for (const auto& v : variants) {
      if (pass == 1 && v.kind == 2 && v.prefetch == 0 && !v.pdl) continue;
      refresh();
      const float chain = time_graph([&] { for (int n = 0; n < layers; n++) layer_of(v, n, 0); head(v); }, replays);
      refresh();
      const float paused = time_graph([&] { for (int n = 0; n < layers; n++) layer_of(v, n, 15000); head(v); }, replays);
      printf("%-28s %4d %6lld %6lld | %8.3f %8.3f |", v.name, v.pdl, (long long)(v.prefetch / MB), (long long)(v.pause_prefetch / MB), chain, paused);
      if (pass == 0 && v.prefetch == 0) {
        refresh();
        const float us[5] = {
            time_graph([&] { for (auto& l : all) product(v, {&l.q, &l.k, &l.v}, false, rows, x, norm, nullptr, {q, k, v_}, STILL_BF16, nullptr); }, replays) / layers * 1e3f,
            time_graph([&] { for (auto& l : all) product(v, {&l.o}, false, rows, q, nullptr, x, {mid}, STILL_BF16, nullptr); }, replays) / layers * 1e3f,
            time_graph([&] { for (auto& l : all) product(v, {&l.gate, &l.up}, true, rows, x, norm, nullptr, {hidden}, STILL_BF16, nullptr); }, replays) / layers * 1e3f,
            time_graph([&] { for (auto& l : all) product(v, {&l.down}, false, rows, hidden, nullptr, x, {mid}, STILL_BF16, nullptr); }, replays) / layers * 1e3f,
            time_graph([&] { for (int i = 0; i < 4; i++) head(v); }, replays) / 4 * 1e3f};
        for (float t : us) printf(" %7.1f", t);
      }
      printf("\n");
      fflush(stdout);
    }
  CHECK(cudaDeviceSynchronize());
  return 0;
}
