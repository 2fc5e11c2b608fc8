// Records every call of the CUDA driver and runtime, and every kernel, copy and set of a process:
//   CUDA_INJECTION64_PATH=$PWD/libapi.so STILL_TRACE=FILE program …
#include <cupti.h>
#include <cstdio>
#include <cstdlib>
#include <mutex>
static FILE* file;
static std::mutex lock;
static void CUPTIAPI requested(uint8_t** buffer, size_t* size, size_t* records) {
  *size = 16 << 20, *buffer = (uint8_t*)aligned_alloc(64, *size), *records = 0;
}
static const char* name_of(CUpti_Activity* record) {
  const char* name = "?";
  auto* call = (CUpti_ActivityAPI*)record;
  cuptiGetCallbackName(record->kind == CUPTI_ACTIVITY_KIND_DRIVER ? CUPTI_CB_DOMAIN_DRIVER_API : CUPTI_CB_DOMAIN_RUNTIME_API, call->cbid, &name);
  return name;
}
static void CUPTIAPI completed(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  std::lock_guard<std::mutex> held(lock);
  CUpti_Activity* record = nullptr;
  using U = unsigned long long;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_DRIVER || record->kind == CUPTI_ACTIVITY_KIND_RUNTIME) {
      auto* a = (CUpti_ActivityAPI*)record;
      fprintf(file, "%llu %llu A %u %s\n", (U)a->start, (U)a->end, a->threadId, name_of(record));
    } else if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      auto* k = (CUpti_ActivityKernel9*)record;
      fprintf(file, "%llu %llu K %d,%d,%d %.160s\n", (U)k->start, (U)k->end, k->gridX, k->gridY, k->gridZ, k->name);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      auto* m = (CUpti_ActivityMemcpy5*)record;
      fprintf(file, "%llu %llu C %llu memcpy%d\n", (U)m->start, (U)m->end, (U)m->bytes, m->copyKind);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      auto* m = (CUpti_ActivityMemset4*)record;
      fprintf(file, "%llu %llu S %llu memset\n", (U)m->start, (U)m->end, (U)m->bytes);
    }
  }
  free(buffer);
}
static void finish() {
  cuptiActivityFlushAll(1);
  fflush(file);
}
extern "C" int InitializeInjection() {
  const char* path = getenv("STILL_TRACE");
  file = fopen(path ? path : "/tmp/trace.txt", "w");
  cuptiActivityRegisterCallbacks(requested, completed);
  int e = 0;
  for (auto kind : {CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_RUNTIME, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY,
                    CUPTI_ACTIVITY_KIND_MEMSET})
    e |= cuptiActivityEnable(kind);
  fprintf(stderr, "trace: %d\n", e);
  atexit(finish);
  return 1;
}
