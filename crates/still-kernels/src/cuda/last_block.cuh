// The block that finishes last adds up what all have left.
#pragma once
#include <cstdint>

namespace still {

// Whether the block is the last of `blocks` to come here, which then sees what the others wrote before. All threads call, once. The
// counter is zero before and after.
__device__ __forceinline__ bool is_last_block(uint32_t* arrived, unsigned blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived), "r"(blocks - 1) : "memory");
    last = before == blocks - 1;
  }
  __syncthreads();
  return last;
}

}  // namespace still
