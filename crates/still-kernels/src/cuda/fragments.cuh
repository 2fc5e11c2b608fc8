// Operands and sums of products, held in registers as mma.sync has them: a warp's 16 rows, of which a lane holds two, 8 apart, and of
// each 8 columns two. Products of a tile without warpgroups.
#pragma once
#include "tile.cuh"

namespace still {

// A 16x16 left operand. Lane l holds rows l/4 and l/4 + 8.
template <int P>
struct Left {
  uint32_t r[P][4];
};

template <class TILE>
__device__ __forceinline__ void load_left(Left<TILE::P>& a, TILE tile, int row, int col) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < TILE::P; p++) load_matrices(a.r[p], tile.at(p, row + lane % 16, col + lane / 16 * 8));
}

// The transpose of tile[row.., col..] as a left operand: its columns are the rows of the product.
template <class TILE>
__device__ __forceinline__ void load_left_transposed(Left<TILE::P>& a, TILE tile, int row, int col) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < TILE::P; p++)
    load_matrices_transposed(a.r[p], tile.at(p, row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8));
}

// Sums (16 x 8 NT) to left operands.
template <int P>
__device__ __forceinline__ void to_left(Left<P>& a, const float (&x)[4], const float (&y)[4]) {
  uint32_t t[P];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float* s = i < 2 ? x : y;
    split<P>(s[i % 2 * 2], s[i % 2 * 2 + 1], t);
#pragma unroll
    for (int p = 0; p < P; p++) a.r[p][i] = t[p];
  }
}

template <int P>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<P>& a, const uint32_t (&b)[P][4], int half) {
  if constexpr (P == 2) {
    mma(c, a.r[1], b[0][2 * half], b[0][2 * half + 1]);
    mma(c, a.r[0], b[1][2 * half], b[1][2 * half + 1]);
  }
  mma(c, a.r[0], b[0][2 * half], b[0][2 * half + 1]);
}

// Right operands come two tiles of 8 at a time: where tile `n` of an odd number is the last, both are that one, so that nothing is read
// behind it. How much nearer its second tile is.
template <int NT>
__device__ __forceinline__ int last_alone(int n) { return n + 1 == NT ? threadIdx.x % 32 / 16 * 8 : 0; }

template <int P, int NT>
__device__ __forceinline__ void multiply_two(float (&sums)[NT][4], int n, const Left<P>& a, const uint32_t (&b)[P][4]) {
  multiply(sums[n], a, b, 0);
  if (n + 1 < NT) multiply(sums[n + 1 < NT ? n + 1 : n], a, b, 1);
}

// sums += a Bt, B = tile[row.., 16 KS columns], 8 NT rows.
template <int KS, int NT, class TILE>
__device__ __forceinline__ void product_nt(float (&sums)[NT][4], const Left<TILE::P> (&a)[KS], TILE tile, int row) {
  int lane = threadIdx.x % 32, r = row + lane / 16 * 8 + lane % 8, c = lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < KS; k++)
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[TILE::P][4];
#pragma unroll
      for (int p = 0; p < TILE::P; p++) load_matrices(b[p], tile.at(p, r + n * 8 - last_alone<NT>(n), k * 16 + c));
      multiply_two(sums, n, a[k], b);
    }
}

template <int NT>
__device__ __forceinline__ void clear(float (&x)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) x[n][i] = 0.f;
}

// Calls `f(x, half, column)` with each of a lane's sums: row `half` of its two, and the column among 8 NT.
template <int NT, class F>
__device__ __forceinline__ void each_sum(float (&x)[NT][4], F f) {
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) f(x[n][e], e / 2, n * 8 + first + e % 2);
}

// Adds `add(y)` to the sums of one of a lane's two rows, y the values of row `from` in their columns.
template <int NT, class T, class Add>
__device__ __forceinline__ void add_row(float (&sums)[NT][4], int half, const T* from, Add add) {
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const float2 y = read_pair(from + n * 8 + threadIdx.x % 4 * 2);
    sums[n][half * 2] += add(y.x);
    sums[n][half * 2 + 1] += add(y.y);
  }
}

// sums += a B, B = tile[row.., col..], 16 KS rows and 8 NT columns. f32 data have 16 bits or more to keep, and tensor cores round
// what they add up toward zero: their product is made apart, a few columns at a time, and added to the nearest.
template <int KS, int NT, class TILE>
__device__ __forceinline__ void product_nn(float (&sums)[NT][4], const Left<TILE::P> (&a)[KS], TILE tile, int row, int col = 0) {
  constexpr bool APART = TILE::P == 2;
  constexpr int FEW = APART ? 4 : NT;
  int lane = threadIdx.x % 32, r = row + lane % 16, c = col + lane / 16 * 8;
#pragma unroll
  for (int first = 0; first < NT; first += FEW) {
    float part[APART ? FEW : 1][4];
    clear(part);
#pragma unroll
    for (int k = 0; k < KS; k++)
#pragma unroll
      for (int n = first; n < NT && n < first + FEW; n += 2) {
        uint32_t b[TILE::P][4];
#pragma unroll
        for (int p = 0; p < TILE::P; p++) load_matrices_transposed(b[p], tile.at(p, r + k * 16, c + n * 8 - last_alone<NT>(n)));
        if constexpr (APART) multiply_two(part, n - first, a[k], b); else multiply_two(sums, n, a[k], b);
      }
    if constexpr (APART)
#pragma unroll
      for (int n = first; n < NT && n < first + FEW; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[n][e] += part[n - first][e];
  }
}

// Stores one of a lane's two rows of sums, times `factor`, if `on` (the same for the row's four lanes; all lanes call). In bf16
// the lanes of two neighbouring tiles trade, so that a store fills whole sectors.
template <int NT>
__device__ __forceinline__ void store_row(bool on, float* to, const float (&x)[NT][4], int half, float factor) {
  if (!on) return;
#pragma unroll
  for (int n = 0; n < NT; n++) store_pair(to + n * 8 + threadIdx.x % 4 * 2, x[n][half * 2] * factor, x[n][half * 2 + 1] * factor);
}
template <int NT>
__device__ __forceinline__ void store_row(bool on, __nv_bfloat16* to, const float (&x)[NT][4], int half, float factor) {
  const int c = threadIdx.x % 4, first = c < 2 ? c * 2 : (c - 2) * 2 + 1, second = c < 2 ? c * 2 + 1 : (c - 2) * 2;
#pragma unroll
  for (int n = 0; n + 1 < NT; n += 2) {
    uint32_t a = pack(x[n][half * 2] * factor, x[n][half * 2 + 1] * factor);
    uint32_t b = pack(x[n + 1][half * 2] * factor, x[n + 1][half * 2 + 1] * factor);
    uint32_t r = __shfl_sync(0xffffffffu, c % 2 ? b : a, first, 4), s = __shfl_sync(0xffffffffu, c % 2 ? a : b, second, 4);
    if (on) *reinterpret_cast<uint2*>(to + n * 8 + c * 4) = c < 2 ? make_uint2(r, s) : make_uint2(s, r);
  }
  if (NT % 2 == 1 && on) store_pair(to + (NT - 1) * 8 + c * 2, x[NT - 1][half * 2] * factor, x[NT - 1][half * 2 + 1] * factor);
}

// Sums to rows of a tile, from column `col`.
template <class TILE, int NT>
__device__ __forceinline__ void store_tile(TILE tile, int row, int col, const float (&x)[NT][4]) {
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t t[TILE::P];
      split<TILE::P>(x[n][half * 2], x[n][half * 2 + 1], t);
#pragma unroll
      for (int p = 0; p < TILE::P; p++)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile.at(p, row + half * 8, col + n * 8) + threadIdx.x % 4 * 4), "r"(t[p]) : "memory");
    }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace still
