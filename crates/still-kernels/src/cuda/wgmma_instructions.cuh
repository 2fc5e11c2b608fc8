// Hopper's warpgroup instructions, one function each. They run on after they are issued: their registers may not be touched
// before `wgmma_wait`.
#pragma once
#include <cstdint>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define STILL_HOPPER 1
#else
#define STILL_HOPPER 0
#endif

#if STILL_HOPPER

namespace still {

// Rows of a product's depth are `panel` bytes apart every 64 columns of b, 1024 bytes every 8 rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t panel) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Keeps the compiler from moving registers across asynchronous products.
template <int NT>
__device__ __forceinline__ void hold(float (&x)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(x[n][i])::"memory");
}

// The operands of a product of 64 rows by N columns, of which a thread holds N / 8 tiles of four sums. They come first: they are
// numbered from %0.
#define STILL_TILE(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define STILL_TILES_4(n) STILL_TILE(n), STILL_TILE(n + 1), STILL_TILE(n + 2), STILL_TILE(n + 3)
#define STILL_TILES_32 STILL_TILES_4(0)
#define STILL_TILES_64 STILL_TILES_32, STILL_TILES_4(4)
#define STILL_TILES_128 STILL_TILES_64, STILL_TILES_4(8), STILL_TILES_4(12)
#define STILL_TILES_256 STILL_TILES_128, STILL_TILES_4(16), STILL_TILES_4(20), STILL_TILES_4(24), STILL_TILES_4(28)

// Their numbers, as the instruction's text lists them: ten after each, then what is left.
#define STILL_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define STILL_NUMBERS_32 STILL_TEN() "%10, %11, %12, %13, %14, %15"
#define STILL_NUMBERS_64 STILL_TEN() STILL_TEN(1) STILL_TEN(2) "%30, %31"
#define STILL_SIXTY STILL_TEN() STILL_TEN(1) STILL_TEN(2) STILL_TEN(3) STILL_TEN(4) STILL_TEN(5)
#define STILL_NUMBERS_128 STILL_SIXTY "%60, %61, %62, %63"
#define STILL_NUMBERS_256                                                                                             \
  STILL_SIXTY STILL_TEN(6) STILL_TEN(7) STILL_TEN(8) STILL_TEN(9) STILL_TEN(10) STILL_TEN(11)                         \
  "%120, %121, %122, %123, %124, %125, %126, %127"

// The instruction, which adds to the sums if `add` is not 0; operands of its text by number.
#define STILL_PRODUCT(N, add, a, b, transposed)                                                                       \
  "{.reg .pred p; setp.ne.b32 p, " add ", 0; "                                                                        \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" STILL_NUMBERS_##N "}, " a ", " b                       \
  ", p, 1, 1, " transposed ";}"

// c = or += a b, both in shared memory.
#define STILL_WGMMA_SHARED(N, a_, b_, add_, a_transposed, b_transposed)                                               \
  template <int A_TRANSPOSED, int B_TRANSPOSED>                                                                       \
  __device__ __forceinline__ void wgmma_shared(float (&c)[N / 8][4], uint64_t a, uint64_t b, int add) {               \
    asm volatile(STILL_PRODUCT(N, add_, a_, b_, a_transposed ", " b_transposed)                                       \
                 : STILL_TILES_##N                                                                                    \
                 : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED));                                   \
  }
STILL_WGMMA_SHARED(32, "%16", "%17", "%18", "%19", "%20")
STILL_WGMMA_SHARED(64, "%32", "%33", "%34", "%35", "%36")
STILL_WGMMA_SHARED(128, "%64", "%65", "%66", "%67", "%68")
STILL_WGMMA_SHARED(256, "%128", "%129", "%130", "%131", "%132")

// The same with `a` in registers.
#define STILL_WGMMA(N, a_, b_, add_, transposed)                                                                      \
  template <int TRANSPOSED>                                                                                           \
  __device__ __forceinline__ void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) {          \
    asm volatile(STILL_PRODUCT(N, add_, "{" a_ "}", b_, transposed)                                                   \
                 : STILL_TILES_##N                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));                    \
  }
STILL_WGMMA(64, "%32, %33, %34, %35", "%36", "%37", "%38")
STILL_WGMMA(128, "%64, %65, %66, %67", "%68", "%69", "%70")
STILL_WGMMA(256, "%128, %129, %130, %131", "%132", "%133", "%134")

}  // namespace still

#endif
