// Matrices in shared memory and in registers.
//
// A value is held in P planes of bf16: one if the data are bf16; two (x = high + low, 16 bits of mantissa) if they are
// f32, whose products are then three bf16 products. One kernel serves both.
//
// In shared memory a row is cut into panels of 64 columns (128 bytes), whose 16-byte pieces are permuted by the row
// (piece ^ row % 8): ldmatrix reads it without bank conflicts, and it is the layout that wgmma calls 128-byte swizzle.
#pragma once
#include "mma.cuh"

namespace still {

constexpr int CHUNK = 64;
constexpr float LOG2E = 1.4426950408889634f;

template <class T> constexpr int planes = 2;
template <> constexpr int planes<__nv_bfloat16> = 1;

__device__ __forceinline__ uint32_t pack(float low, float high) {
  __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(x);
}
__device__ __forceinline__ float2 unpack(uint32_t x) {
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

// Two values in P planes.
template <int P>
__device__ __forceinline__ void split(float x, float y, uint32_t (&to)[P]) {
  to[0] = pack(x, y);
  if constexpr (P == 2) {
    float2 h = unpack(to[0]);
    to[1] = pack(x - h.x, y - h.y);
  }
}

__device__ __forceinline__ void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack(x, y); }

__device__ __forceinline__ float2 read_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 read_pair(const __nv_bfloat16* from) { return unpack(*reinterpret_cast<const uint32_t*>(from)); }

template <int P_, int ROWS_, int COLS_>
struct Tile {
  static constexpr int P = P_, ROWS = ROWS_, COLS = COLS_;
  static constexpr int PANEL = ROWS * 128, PLANE = (COLS + 63) / 64 * PANEL, BYTES = P * PLANE;
  uint32_t base;

  // Address of the 16-byte piece that holds (row, col).
  __device__ __forceinline__ uint32_t at(int plane, int row, int col) const {
    return base + plane * PLANE + (col >> 6) * PANEL + row * 128 + ((((col & 63) >> 3) ^ (row & 7)) << 4);
  }
};

// Two values from (row, col) of a tile, col even.
template <class TILE>
__device__ __forceinline__ float2 read_pair(TILE tile, int row, int col) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (int p = 0; p < TILE::P; p++) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(tile.at(p, row, col & ~7) + (col & 7) * 2) : "memory");
    float2 part = unpack(x);
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// Eight values to (row, col) of a tile, asynchronously where the data are bf16; zeros if `from` is null.
template <class T, class TILE>
__device__ __forceinline__ void copy_piece(TILE tile, int row, int col, const T* from, const T* any) {
  const uint32_t to = tile.at(0, row, col);
  if constexpr (TILE::P == 1) {
    copy_async(to, from ? from : any, from != nullptr);
  } else {
    uint4 high = make_uint4(0, 0, 0, 0), low = high;
    if (from) {
      float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
      uint32_t x[2], y[2], z[2], w[2];
      split<2>(a.x, a.y, x); split<2>(a.z, a.w, y); split<2>(b.x, b.y, z); split<2>(b.z, b.w, w);
      high = make_uint4(x[0], y[0], z[0], w[0]);
      low = make_uint4(x[1], y[1], z[1], w[1]);
    }
    store_shared(to, high);
    store_shared(to + TILE::PLANE, low);
  }
}

// Copies `count` rows to rows `first..` of a tile, asynchronously where the data are bf16. `row_of(i)` points at row i or
// is null (zeros).
template <int THREADS, class T, class TILE, class RowOf>
__device__ __forceinline__ void load_rows(TILE tile, int first, int count, const T* any, RowOf row_of) {
  constexpr int PIECES = TILE::COLS / 8;
  for (int i = threadIdx.x; i < count * PIECES; i += THREADS) {
    int row = i / PIECES, col = i % PIECES * 8;
    const T* from = row_of(row);
    copy_piece(tile, first + row, col, from ? from + col : nullptr, any);
  }
}

// The same for rows `stride` apart, of which `valid` exist.
template <int THREADS, int COUNT, class T, class TILE>
__device__ __forceinline__ void load_matrix(TILE tile, int first, const T* from, int64_t stride, int valid = COUNT) {
  constexpr int PIECES = TILE::COLS / 8, STEPS = (COUNT * PIECES + THREADS - 1) / THREADS;
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    const int i = threadIdx.x + j * THREADS, row = i / PIECES, col = i % PIECES * 8;
    if (COUNT * PIECES % THREADS != 0 && i >= COUNT * PIECES) break;
    copy_piece(tile, first + row, col, row < valid ? from + row * stride + col : nullptr, from);
  }
}

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
