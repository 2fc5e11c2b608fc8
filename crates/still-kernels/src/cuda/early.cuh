// Kernels of a step that begin before the one before them has ended (`launch_early`). Each lets the next one begin when all its blocks
// have, and waits for the one before before it touches what a kernel of the step writes.
#pragma once
#include <cstdint>

namespace still {

// From here on blocks of the next kernel may take the places that this one's leave.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended, and with it all before that one; what they wrote is seen after it. At least one block of
// every kernel has to.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings up to 4096 bytes from `from` on to the second-level cache: a warp's lanes 128 each.
__device__ __forceinline__ void prefetch_lines(const void* from, int bytes) {
  const int at = threadIdx.x % 32 * 128;
  if (at < bytes) asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
}

}  // namespace still
