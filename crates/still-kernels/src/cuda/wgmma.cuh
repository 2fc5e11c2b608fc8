// Hopper's warpgroup products: 64 rows by n columns, b (and a, in wgmma_shared) read from shared memory as it lies in a Tile.
//
// Four warps whose lanes hold rows as in mma.sync, so that sums and left operands are the same arrays.
#pragma once
#include "fragments.cuh"
#include "wgmma_instructions.cuh"

namespace still {

// Whether the products of a tile run on warpgroups: bf16, whole panels.
template <int P, int D>
constexpr bool WARPGROUP = STILL_HOPPER && P == 1 && D % 64 == 0;

#if STILL_HOPPER

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
        for (int p = 0; p < A::P; p++) load_matrices(y[p], b.at(p, r + n * 8 - last_alone<NT>(n), k * 16 + c));
        multiply_two(sums, n, x, y);
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
