// Records every kernel, copy and set of a process: CUDA_INJECTION64_PATH=libtrace.so STILL_TRACE=FILE program …
#include <cupti.h>
#include <cstdio>
#include <cstdlib>
#include <mutex>
static FILE* file;
static std::mutex lock;
static void CUPTIAPI requested(uint8_t** buffer, size_t* size, size_t* records) { *size = 8 << 20; *buffer = (uint8_t*)aligned_alloc(64, *size); *records = 0; }
static void CUPTIAPI completed(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  std::lock_guard<std::mutex> held(lock);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL || record->kind == CUPTI_ACTIVITY_KIND_KERNEL) {
      auto* k = (CUpti_ActivityKernel9*)record;
      fprintf(file, "%llu %llu K %d,%d,%d %d %.160s\n", (unsigned long long)k->start, (unsigned long long)k->end, k->gridX, k->gridY, k->gridZ, k->blockX * k->blockY, k->name);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      auto* m = (CUpti_ActivityMemcpy5*)record;
      fprintf(file, "%llu %llu C %llu %d memcpy\n", (unsigned long long)m->start, (unsigned long long)m->end, (unsigned long long)m->bytes, m->copyKind);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      auto* m = (CUpti_ActivityMemset4*)record;
      fprintf(file, "%llu %llu S %llu 0 memset\n", (unsigned long long)m->start, (unsigned long long)m->end, (unsigned long long)m->bytes);
    }
  }
  free(buffer);
}
static void finish() { cuptiActivityFlushAll(1); fflush(file); }
extern "C" int InitializeInjection() {
  const char* path = getenv("STILL_TRACE");
  file = fopen(path ? path : "/tmp/trace.txt", "w");
  cuptiActivityRegisterCallbacks(requested, completed);
  int e = 0;
  e |= cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  e |= cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  e |= cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
  fprintf(stderr, "trace: %d\n", e);
  atexit(finish);
  return 1;
}
