// Matrices in block formats, as tensor cores take them (`fragments` of still-quant makes them so).
//
// A matrix is cut into tiles of 16 rows and 64 columns, all of 16 rows one after the other; rows and columns past the last are
// zeros. A tile's codes lie as the lanes of a warp hold them for products of 16 rows with 16 columns: lane 4 g + t has rows g and
// g + 8, and of each block of 32 columns first 4 t .. 4 t + 3, then 16 + 4 t .. 16 + 4 t + 3. Its loads are 16 bytes from adjacent
// addresses, and codes become bf16, which holds them exactly, without leaving the lane.
//
// After all codes come the scales of all tiles, row g next to row g + 8; then what tiles of 256 columns, or all of 16 rows, share.
#pragma once
#include <cuda_fp16.h>
#include "decoder.h"
#include "tile.cuh"

namespace still {

constexpr int TILE_ROWS = 16, TILE_COLUMNS = 64, BLOCK = 32;

// Tiles of 16 rows, or of a row.
__host__ __device__ inline int row_tiles(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
__host__ __device__ inline int column_tiles(int columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }

// A row of tiles, from some tile on. A format `F` says how many words a tile's codes and scales take, and what a row of tiles shares.
template <class F>
struct TileRow {
  const uint32_t *codes, *scales, *shared;

  __device__ __forceinline__ TileRow() {}
  __device__ __forceinline__ TileRow(const void* matrix, int rows, int columns, int tile) {
    const int steps = column_tiles(columns);
    const int64_t all = int64_t(row_tiles(rows)) * steps, first = int64_t(tile) * steps;
    const uint32_t* words = static_cast<const uint32_t*>(matrix);
    codes = words + first * F::CODES;
    scales = words + all * F::CODES + first * F::SCALES;
    shared = words + all * (F::CODES + F::SCALES) + int64_t(tile) * F::shared_words(steps);
  }
};

template <class F>
inline int64_t matrix_words(int rows, int columns) {
  const int64_t steps = column_tiles(columns);
  return row_tiles(rows) * (steps * (F::CODES + F::SCALES) + F::shared_words(steps));
}

// Of what is read once: it need not stay in any cache.
__device__ __forceinline__ void stream(uint32_t (&to)[4], const uint32_t* from) {
  const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void stream(uint32_t (&to)[2], const uint32_t* from) {
  const uint2 x = __ldcs(reinterpret_cast<const uint2*>(from));
  to[0] = x.x, to[1] = x.y;
}

__device__ __forceinline__ float half_of(uint32_t word, int which) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * which)));
}
__device__ __forceinline__ float byte_of(uint32_t word, int which) { return float(word >> 8 * which & 0xffu); }

__device__ __forceinline__ uint32_t minus(uint32_t a, uint32_t b) {
  const __nv_bfloat162 x = __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  const __nv_bfloat162 x = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}

// Two bf16 of 128: with a code below 128 in the mantissa each is the sum of both. Kernels are given it, so that it lies in a
// register: an instruction that masks and adds has place for one constant.
constexpr uint32_t BASE = 0x43004300u;

// A[product][register] of a block: registers 0 and 2 are of row g, 1 and 3 of row g + 8.
using Fragments = uint32_t[2][4];

// Codes of a byte. A word has columns 0, 2, 1, 3 of its four.
template <class F>
struct Bytes {
  static constexpr int CODES = 256, DEPTH = 4;
  struct Codes {
    uint32_t rows[2][4];
  };
  static __device__ __forceinline__ void load(Codes& to, const uint32_t* tile, int lane) {
    stream(to.rows[0], tile + lane * 4);
    stream(to.rows[1], tile + lane * 4 + 128);
  }
  static __device__ __forceinline__ void fragments(const Codes& codes, int block, uint32_t base, Fragments& to) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t word = codes.rows[i % 2][2 * block + i / 2];
      to[i / 2][i % 2] = F::even(word, base);
      to[i / 2][2 + i % 2] = F::odd(word, base);
    }
  }
};

// Codes of four bits less `ZERO`. A word has a row's eight of a block: the first of each two in its low half.
template <int ZERO>
struct Nibbles {
  static constexpr int CODES = 128, DEPTH = 6;
  struct Codes {
    uint32_t words[4];
  };
  static __device__ __forceinline__ void load(Codes& to, const uint32_t* tile, int lane) { stream(to.words, tile + lane * 4); }
  static __device__ __forceinline__ void fragments(const Codes& codes, int block, uint32_t base, Fragments& to) {
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const uint32_t sum = (codes.words[2 * block + row] >> 4 * pair & 0x000f000fu) | base;
        to[pair / 2][pair % 2 * 2 + row] = minus(sum, BASE | ZERO << 16 | ZERO);
      }
  }
};

// value = scale code, a scale for 32.
struct Q8_0 : Bytes<Q8_0> {
  static constexpr int SCALES = 16, GROUP = 32;
  static constexpr bool OFFSET = false;
  static __host__ __device__ int shared_words(int) { return 0; }
  struct Scales {
    uint32_t rows[2];
  };
  static __device__ __forceinline__ uint32_t even(uint32_t word, uint32_t base) {
    return minus((word & 0x007f007fu) | base, (word & 0x00800080u) | base);
  }
  static __device__ __forceinline__ uint32_t odd(uint32_t word, uint32_t base) { return even(word >> 8, base); }
  static __device__ __forceinline__ void load(Scales& to, const TileRow<Q8_0>& row, int ahead, int step, int lane) {
    stream(to.rows, row.scales + lane / 4 * 2 + ahead * SCALES);
  }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int block, int) {
    return half_of(scales.rows[row], block);
  }
  static __device__ __forceinline__ float offset(const Scales&, int, int) { return 0.f; }
  using Bytes<Q8_0>::load;
};

// value = scale (code - 8), a scale for 32.
struct Q4_0 : Nibbles<8> {
  static constexpr int SCALES = 16, GROUP = 32;
  static constexpr bool OFFSET = false;
  static __host__ __device__ int shared_words(int) { return 0; }
  struct Scales {
    uint32_t rows[2];
  };
  static __device__ __forceinline__ void load(Scales& to, const TileRow<Q4_0>& row, int ahead, int step, int lane) {
    stream(to.rows, row.scales + lane / 4 * 2 + ahead * SCALES);
  }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int block, int) {
    return half_of(scales.rows[row], block);
  }
  static __device__ __forceinline__ float offset(const Scales&, int, int) { return 0.f; }
  using Nibbles<8>::load;
};

// value = scale code + minimum, both for 32.
struct Q4_1 : Nibbles<0> {
  static constexpr int SCALES = 32, GROUP = 32;
  static constexpr bool OFFSET = true;
  static __host__ __device__ int shared_words(int) { return 0; }
  struct Scales {
    uint32_t words[4];
  };
  static __device__ __forceinline__ void load(Scales& to, const TileRow<Q4_1>& row, int ahead, int step, int lane) {
    stream(to.words, row.scales + lane / 4 * 4 + ahead * SCALES);
  }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int block, int) {
    return half_of(scales.words[2 * row + block], 0);
  }
  static __device__ __forceinline__ float offset(const Scales& scales, int row, int block) {
    return half_of(scales.words[2 * row + block], 1);
  }
  using Nibbles<0>::load;
};

// value = scale a code - minimum b, a and b of a byte for 32, scale and minimum for 256.
struct Q4_K : Nibbles<0> {
  static constexpr int SCALES = 16, GROUP = 32, SHARED = 16, DEPTH = 4;
  static constexpr bool OFFSET = true;
  static __host__ __device__ int shared_words(int steps) { return steps / 4 * SHARED; }
  struct Scales {
    uint32_t rows[2];
    uint2 all;
  };
  static __device__ __forceinline__ void load(Scales& to, const TileRow<Q4_K>& row, int ahead, int step, int lane) {
    stream(to.rows, row.scales + lane / 4 * 2 + ahead * SCALES);
    to.all = __ldg(reinterpret_cast<const uint2*>(row.shared + step / 4 * SHARED + lane / 4 * 2));
  }
  static __device__ __forceinline__ uint32_t all(const Scales& scales, int row) { return row == 0 ? scales.all.x : scales.all.y; }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int block, int) {
    return half_of(all(scales, row), 0) * byte_of(scales.rows[row], 2 * block);
  }
  static __device__ __forceinline__ float offset(const Scales& scales, int row, int block) {
    return -half_of(all(scales, row), 1) * byte_of(scales.rows[row], 2 * block + 1);
  }
  using Nibbles<0>::load;
};

// value = scale a (code - 32), a of a signed byte for 16, scale for 256. Codes have four low bits as above, then two high ones.
struct Q6_K {
  static constexpr int CODES = 192, SCALES = 16, GROUP = 16, SHARED = 8, DEPTH = 4;
  static constexpr bool OFFSET = false;
  static __host__ __device__ int shared_words(int steps) { return steps / 4 * SHARED; }
  struct Codes {
    uint32_t low[4], high[2];
  };
  struct Scales {
    uint32_t rows[2], all;
  };
  static __device__ __forceinline__ void load(Codes& to, const uint32_t* tile, int lane) {
    stream(to.low, tile + lane * 4);
    stream(to.high, tile + 128 + lane * 2);
  }
  static __device__ __forceinline__ void load(Scales& to, const TileRow<Q6_K>& row, int ahead, int step, int lane) {
    stream(to.rows, row.scales + lane / 4 * 2 + ahead * SCALES);
    to.all = __ldg(row.shared + step / 4 * SHARED + lane / 4);
  }
  static __device__ __forceinline__ void fragments(const Codes& codes, int block, uint32_t base, Fragments& to) {
#pragma unroll
    for (int pair = 0; pair < 4; pair++)
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const uint32_t low = (codes.low[2 * block + row] >> 4 * pair & 0x000f000fu) | base;
        const int at = 8 * block + 2 * pair;
        const uint32_t high = (at < 4 ? codes.high[row] << (4 - at) : codes.high[row] >> (at - 4)) & 0x00300030u;
        to[pair / 2][pair % 2 * 2 + row] = minus(low | high, BASE | 0x00200020u);
      }
  }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int block, int product) {
    const int a = static_cast<int8_t>(scales.rows[row] >> 8 * (2 * block + product));
    return half_of(scales.all, row) * float(a);
  }
  static __device__ __forceinline__ float offset(const Scales&, int, int) { return 0.f; }
};

// value = scale code, a code of 4 bits of exponent and 3 of mantissa, a scale in f32 for a row.
struct E4M3 : Bytes<E4M3> {
  static constexpr int SCALES = 0, GROUP = 0;
  static constexpr bool OFFSET = false;
  static __host__ __device__ int shared_words(int) { return TILE_ROWS; }
  struct Scales {
    float2 rows;
  };
  // In bf16 the exponent is 120 more.
  static constexpr uint32_t UP = 0x7b807b80u;
  static __device__ __forceinline__ uint32_t even(uint32_t word, uint32_t) {
    return times((word & 0x00800080u) << 8 | (word & 0x007f007fu) << 4, UP);
  }
  static __device__ __forceinline__ uint32_t odd(uint32_t word, uint32_t) {
    return times((word & 0x80008000u) | (word & 0x7f007f00u) >> 4, UP);
  }
  static __device__ __forceinline__ void load(Scales& to, const TileRow<E4M3>& row, int, int, int lane) {
    to.rows = __ldg(reinterpret_cast<const float2*>(row.shared) + lane / 4);
  }
  static __device__ __forceinline__ float scale(const Scales& scales, int row, int, int) {
    return row == 0 ? scales.rows.x : scales.rows.y;
  }
  static __device__ __forceinline__ float offset(const Scales&, int, int) { return 0.f; }
  using Bytes<E4M3>::load;
};

// Calls `f` with a value of the format's type.
template <class R, class Call>
R by_format(int32_t format, R other, Call f) {
  switch (format) {
    case STILL_Q8_0: return f(Q8_0{});
    case STILL_Q4_0: return f(Q4_0{});
    case STILL_Q4_1: return f(Q4_1{});
    case STILL_Q4_K: return f(Q4_K{});
    case STILL_Q6_K: return f(Q6_K{});
    case STILL_E4M3: return f(E4M3{});
    default: return other;
  }
}

}  // namespace still
