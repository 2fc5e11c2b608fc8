// What nodes of a CUDA graph cost: kernels alone, with memory nodes between them, with programmatic edges.
//   nvcc -O3 -std=c++17 -arch=sm_90a dense_probe.cu -o dense_probe && ./dense_probe
#include <cuda_runtime.h>
#include <chrono>
#include <cstdio>
#include <vector>
#define CHECK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { printf("%s: %s\n", #x, cudaGetErrorString(e)); return 1; } } while (0)

__global__ void work(const float* in, float* out, int n, bool early) {
  if (early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (early) asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = in[i] + 1.f;
}

int main() {
  cudaStream_t s;
  CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  cudaMemPool_t pool;
  CHECK(cudaDeviceGetDefaultMemPool(&pool, 0));
  uint64_t all = UINT64_MAX;
  CHECK(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all));
  const int n = 64 * 1024, kernels = 224;
  float *a, *b;
  CHECK(cudaMalloc(&a, n * 4));
  CHECK(cudaMalloc(&b, n * 4));
  CHECK(cudaMemset(a, 0, n * 4));
  auto launch = [&](const float* in, float* out, bool early) {
    cudaLaunchConfig_t config = {};
    config.gridDim = 132;
    config.blockDim = 256;
    config.stream = s;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, work, in, out, n, early);
  };
  for (int memory : {0, 1, 2, 4}) {
    for (bool early : {false, true}) {
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < kernels; i++) {
        std::vector<void*> held(memory);
        for (auto& x : held) CHECK(cudaMallocAsync(&x, 8192, s));
        CHECK(launch(i % 2 ? b : a, i % 2 ? a : b, early));
        for (auto& x : held) CHECK(cudaFreeAsync(x, s));
      }
      CHECK(cudaStreamEndCapture(s, &graph));
      CHECK(cudaGraphInstantiate(&exec, graph, cudaGraphInstantiateFlagAutoFreeOnLaunch));
      for (int i = 0; i < 5; i++) CHECK(cudaGraphLaunch(exec, s));
      CHECK(cudaStreamSynchronize(s));
      const int times = 50;
      auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < times; i++) {
        CHECK(cudaGraphLaunch(exec, s));
        CHECK(cudaStreamSynchronize(s));
      }
      double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / times;
      printf("%d kernels, %d allocations and frees with each, programmatic edges %s: %.1f us a launch, %.2f us a kernel\n", kernels, memory,
             early ? "on" : "off", us, us / kernels);
      CHECK(cudaGraphExecDestroy(exec));
      CHECK(cudaGraphDestroy(graph));
    }
  }
  // Copies of logits to the host: 16 x 49152 and 128256 floats.
  for (int floats : {49152, 128256, 16 * 49152}) {
    float *device, *pinned, *plain = new float[floats]();
    CHECK(cudaMalloc(&device, floats * 4));
    CHECK(cudaMemset(device, 0, floats * 4));
    CHECK(cudaHostAlloc(&pinned, floats * 4, 0));
    for (float* to : {plain, pinned}) {
      CHECK(cudaMemcpyAsync(to, device, floats * 4, cudaMemcpyDeviceToHost, s));
      CHECK(cudaStreamSynchronize(s));
      auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < 20; i++) {
        CHECK(cudaMemcpyAsync(to, device, floats * 4, cudaMemcpyDeviceToHost, s));
        CHECK(cudaStreamSynchronize(s));
      }
      double us = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / 20;
      printf("copy of %d floats to %s memory: %.1f us\n", floats, to == plain ? "plain" : "page-locked", us);
    }
  }
}
