// Hopper's warpgroup products: 64 rows by n columns, b (and a, in wgmma_shared) read from shared memory as it lies in a Tile.
//
// Four warps whose lanes hold rows as in mma.sync, so that sums and left operands are the same arrays. The instructions run
// on after they are issued: their registers may not be touched before `wgmma_wait`.
#pragma once
#include "tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define STILL_HOPPER 1
#else
#define STILL_HOPPER 0
#endif

namespace still {

// Whether the products of a tile run on warpgroups: bf16, whole panels.
template <int P, int D>
constexpr bool WARPGROUP = STILL_HOPPER && P == 1 && D % 64 == 0;

#if STILL_HOPPER

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

template <int A_TRANSPOSED, int B_TRANSPOSED>
__device__ __forceinline__ void wgmma_shared(float (&c)[4][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %18, 0; "
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;}"
               : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3])
               : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED));
}

template <int A_TRANSPOSED, int B_TRANSPOSED>
__device__ __forceinline__ void wgmma_shared(float (&c)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, %36;}"
               : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
               : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED));
}

template <int A_TRANSPOSED, int B_TRANSPOSED>
__device__ __forceinline__ void wgmma_shared(float (&c)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, %67, %68;}"
               : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
               : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED));
}

template <int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; "
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
               : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}

template <int TRANSPOSED>
__device__ __forceinline__ void wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; "
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
               : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANSPOSED));
}

// sums = or += a Bt; a: rows of a tile, B = b[row..] with 8 NT rows; both 16 KS columns. Issues only.
template <int KS, int NT, class A, class B>
__device__ __forceinline__ void issue_nt(float (&sums)[NT][4], A a, int a_row, B b, int row, bool add = false) {
#pragma unroll
  for (int k = 0; k < KS; k++)
    wgmma_shared<0, 0>(sums, descriptor(a.at(0, a_row, 0) + k / 4 * A::PANEL + k % 4 * 32, 16),
                 descriptor(b.at(0, row, 0) + k / 4 * B::PANEL + k % 4 * 32, 16), add || k > 0);
}

// sums = or += a B; B = b[row..], 16 KS rows and 8 NT columns from 0. Issues only.
template <int KS, int NT, class B>
__device__ __forceinline__ void issue_nn(float (&sums)[NT][4], const Left<1> (&a)[KS], B b, int row, bool add = true) {
#pragma unroll
  for (int k = 0; k < KS; k++) wgmma<1>(sums, a[k].r[0], descriptor(b.at(0, row, 0) + k * 2048, B::PANEL), add || k > 0);
}

// sums = or += a Bt, B = b[row..], 8 NT rows, 16 KS columns. Issues only.
template <int KS, int NT, class B>
__device__ __forceinline__ void issue_nt(float (&sums)[NT][4], const Left<1> (&a)[KS], B b, int row, bool add = true) {
#pragma unroll
  for (int k = 0; k < KS; k++)
    wgmma<0>(sums, a[k].r[0], descriptor(b.at(0, row, 0) + k / 4 * B::PANEL + k % 4 * 32, 16), add || k > 0);
}

#endif

// Products come in pairs of start_… and `finish`: on warpgroups they run on between the two, and neither sums nor left operands
// may be touched. `finish<N>` waits for all but the last N that were started.
template <int P, int D, int PENDING = 0>
__device__ __forceinline__ void finish() {
#if STILL_HOPPER
  if constexpr (WARPGROUP<P, D>) wgmma_wait<PENDING>();
#endif
}

// sums = A Bt for 64 rows of a tile, 16 of them this warp's; 16 KS columns, 8 NT rows of B.
template <int KS, int NT, class A, class B>
__device__ __forceinline__ void start_tile_product(float (&sums)[NT][4], A a, int a_row, B b, int row) {
  if constexpr (WARPGROUP<A::P, A::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
    issue_nt<KS>(sums, a, a_row, b, row);
    wgmma_commit();
#endif
  } else {
    clear(sums);
    const int lane = threadIdx.x % 32, r = row + lane / 16 * 8 + lane % 8, c = lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < KS; k++) {
      Left<A::P> x;
      load_left(x, a, a_row + threadIdx.x / 32 % 4 * 16, k * 16);
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        uint32_t y[A::P][4];
#pragma unroll
        for (int p = 0; p < A::P; p++) load_matrices(y[p], b.at(p, r + n * 8, k * 16 + c));
        multiply(sums[n], x, y, 0);
        multiply(sums[n + 1], x, y, 1);
      }
    }
  }
}

// sums += a B.
template <int KS, int NT, class B>
__device__ __forceinline__ void start_add_product(float (&sums)[NT][4], const Left<B::P> (&a)[KS], B b, int row) {
  if constexpr (WARPGROUP<B::P, B::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
    issue_nn<KS>(sums, a, b, row);
    wgmma_commit();
#endif
  } else {
    product_nn<KS, NT>(sums, a, b, row);
  }
}

// sums += A B for 64 rows of a tile (from 0), 16 of them this warp's; 16 KS columns, B's columns from `col`.
template <int KS, int NT, class A, class B>
__device__ __forceinline__ void add_tile_product_nn(float (&sums)[NT][4], A a, B b, int col) {
  if constexpr (WARPGROUP<A::P, B::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KS; k++)
      wgmma_shared<0, 1>(sums, descriptor(a.base + k / 4 * A::PANEL + k % 4 * 32, 16),
                         descriptor(b.base + col / 64 * B::PANEL + col % 64 * 2 + k * 2048, B::PANEL), 1);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
#endif
  } else {
#pragma unroll
    for (int k = 0; k < KS; k++) {
      Left<A::P> x[1];
      load_left(x[0], a, threadIdx.x / 32 % 4 * 16, k * 16);
      product_nn<1, NT>(sums, x, b, k * 16, col);
    }
  }
}

template <int NT>
__device__ __forceinline__ void hold_sums(float (&sums)[NT][4]) {
#if STILL_HOPPER
  hold(sums);
#endif
}

template <int KS, int NT, class A, class B>
__device__ __forceinline__ void tile_product(float (&sums)[NT][4], A a, int a_row, B b, int row) {
  start_tile_product<KS>(sums, a, a_row, b, row);
  finish<A::P, A::COLS>();
  hold_sums(sums);
}

template <int KS, int NT, class B>
__device__ __forceinline__ void add_product(float (&sums)[NT][4], const Left<B::P> (&a)[KS], B b, int row) {
  start_add_product<KS>(sums, a, b, row);
  finish<B::P, B::COLS>();
  hold_sums(sums);
}

// sums += a Bt.
template <int KS, int NT, class B>
__device__ __forceinline__ void add_product_nt(float (&sums)[NT][4], const Left<B::P> (&a)[KS], B b, int row) {
  if constexpr (WARPGROUP<B::P, B::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
    issue_nt<KS>(sums, a, b, row);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
#endif
  } else {
    product_nt<KS, NT>(sums, a, b, row);
  }
}

// sums += At B: 64 columns of a (this warp's 16 of them are the rows of the sums; `left`: the same in registers, used without
// warpgroups), 64 rows of both.
template <int NT, class A, class B>
__device__ __forceinline__ void add_outer_product(float (&sums)[NT][4], const Left<A::P> (&left)[4], A a, B b) {
  static_assert(A::COLS == 64);
  if constexpr (WARPGROUP<A::P, B::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++)
      wgmma_shared<1, 1>(sums, descriptor(a.base + k * 2048, A::PANEL), descriptor(b.base + k * 2048, B::PANEL), 1);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
#endif
  } else {
    product_nn<4, NT>(sums, left, b, 0);
  }
}

// sums = Q Kt for the warp's rows `q_row..` of a tile (`q`: the same rows in registers, used without warpgroups).
template <int KS, int NT, class A, class B>
__device__ __forceinline__ void logits(float (&sums)[NT][4], const Left<A::P> (&q)[KS], A tile, int group_row, B keys, int row) {
  if constexpr (WARPGROUP<A::P, A::COLS>) {
#if STILL_HOPPER
    hold(sums);
    wgmma_fence();
    issue_nt<KS>(sums, tile, group_row, keys, row);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
#endif
  } else {
    clear(sums);
    product_nt<KS, NT>(sums, q, keys, row);
  }
}

// Makes shared memory written by this thread visible to warpgroup products; a barrier follows.
__device__ __forceinline__ void publish() {
#if STILL_HOPPER
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Dynamic shared memory from a 1024-byte boundary (launches ask for that much more).
__device__ __forceinline__ uint32_t aligned(const void* memory) { return (shared_address(memory) + 1023) & ~1023u; }
constexpr int ALIGNMENT = 1024;

}  // namespace still
