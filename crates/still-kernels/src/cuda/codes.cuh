// Rows that a state keeps as codes: 8 bits a value and an f32 scale a row, or 4 bits and two f16 (scale, offset) for each 32
// channels, whose bytes hold channel i low and channel i + 16 high. In each four bytes the middle ones have changed places (byte_of),
// so that a mask leaves two neighbours. A store of rows has all their codes first, then the words that
// scale them. Before a key is coded in 4 bits each 32 channels of it are rotated, so that none of them stands out: by a Walsh-Hadamard
// matrix, which is its own inverse. Queries that meet such keys are rotated too. Channels of keys may be scaled by powers of two (key_scale)
// before that; then queries are multiplied by them.
//
// Everything that encodes does so by a warp, a lane to every 32nd channel: a group's extremes are those of the lanes.
#pragma once
#include <cuda_fp16.h>
#include "launch.cuh"

namespace still {

constexpr int CODE_GROUP = 32;  // channels

__host__ __device__ constexpr int code_groups(int d) { return (d + CODE_GROUP - 1) / CODE_GROUP; }
// Bytes of a row's codes, and the words that scale them.
__host__ __device__ constexpr int code_bytes(int coding, int d) { return coding == STILL_INT8 ? d : code_groups(d) * 16; }
__host__ __device__ constexpr int code_words(int coding, int d) { return coding == STILL_INT8 ? 1 : code_groups(d); }

// Where among bytes in order a code lies.
__device__ __forceinline__ int byte_of(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

__device__ __forceinline__ float2 scale_and_offset(uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}

// Rows in memory.
struct CodedRows {
  uint8_t* codes;
  uint32_t* words;
  int coding, d, bytes, count;
  bool rotated;
  const float* key_scale = nullptr;  // by channel, powers of two: codes are those of a key divided by it

  __device__ __forceinline__ CodedRows(uint8_t* codes, uint32_t* words, int coding, int d, bool keys)
      : codes(codes), words(words), coding(coding), d(d), bytes(code_bytes(coding, d)), count(code_words(coding, d)),
        rotated(keys && coding == STILL_INT4) {}
  // `all` of them, whose words lie behind the codes.
  __device__ __forceinline__ CodedRows(const void* rows, int64_t all, int coding, int d, bool keys)
      : CodedRows(static_cast<uint8_t*>(const_cast<void*>(rows)), words_behind(rows, all, coding, d), coding, d, keys) {}
  static __device__ __forceinline__ uint32_t* words_behind(const void* rows, int64_t all, int coding, int d) {
    return reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(const_cast<void*>(rows)) + all * code_bytes(coding, d));
  }
  __device__ __forceinline__ uint8_t* row(int64_t i) const { return codes + i * bytes; }
  __device__ __forceinline__ uint32_t* scales(int64_t i) const { return words + i * count; }
};

// A row in the registers of a warp: lane l has channels l, l + 32, … of up to GROUPS groups.
template <int GROUPS = code_groups(256)>
struct WarpRow {
  float x[GROUPS];

  template <class T>
  __device__ __forceinline__ void load(const T* from, int d) {
    load_by(d, [&](int channel) { return float(from[channel]); });
  }
  // Channel by channel, from what gives them.
  template <class F>
  __device__ __forceinline__ void load_by(int d, F&& value_of) {
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int channel = j * CODE_GROUP + threadIdx.x % 32;
      x[j] = channel < d ? value_of(channel) : 0.f;
    }
  }
  // Times powers of two, or divided by them.
  __device__ __forceinline__ void multiply(const float* by, int d) {
    each(d, [&](float& x, int channel) { x *= by[channel]; });
  }
  __device__ __forceinline__ void divide(const float* by, int d) {
    each(d, [&](float& x, int channel) { x /= by[channel]; });
  }
  template <class T>
  __device__ __forceinline__ void store(T* to, int d) const {
    store_by(d, [&](int channel, float value) { to[channel] = T(value); });
  }
  template <class F>
  __device__ __forceinline__ void store_by(int d, F&& store_value) const {
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int channel = j * CODE_GROUP + threadIdx.x % 32;
      if (channel < d) store_value(channel, x[j]);
    }
  }

  // Whole groups, as keys are.
  __device__ __forceinline__ void rotate(int d) {
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      if ((j + 1) * CODE_GROUP > d) break;
#pragma unroll
      for (int m = 1; m < CODE_GROUP; m *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, x[j], m);
        x[j] = threadIdx.x & m ? other - x[j] : x[j] + other;
      }
      x[j] = __fmul_rn(x[j], 0.17677669529663687f);  // 1 / sqrt(32); not to be fused with what follows
    }
  }

  // What the codes of row `i` stand for. All lanes call.
  __device__ __forceinline__ void decode(const CodedRows& from, int64_t i) {
    const int lane = threadIdx.x % 32, d = from.d;
    const uint8_t* codes = from.row(i);
    const uint32_t* words = from.scales(i);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int channel = j * CODE_GROUP + lane;
      x[j] = 0.f;
      if (channel >= d) continue;
      if (from.coding == STILL_INT8) {
        x[j] = float(int8_t(codes[byte_of(channel)])) * __uint_as_float(words[0]);
      } else {
        const float2 scale = scale_and_offset(words[j]);
        x[j] = fmaf(float(codes[j * 16 + byte_of(lane % 16)] >> lane / 16 * 4 & 15), scale.x, scale.y);
      }
    }
    if (from.rotated) rotate(d);
    if (from.key_scale) multiply(from.key_scale, d);
  }

  // Becomes what its codes stand for. They go to row `i` of `to`, or nowhere if it is negative. All lanes call.
  __device__ __forceinline__ void encode(const CodedRows& to, int64_t i) {
    if (to.key_scale) divide(to.key_scale, to.d);
    if (to.rotated) rotate(to.d);
    if (to.coding == STILL_INT8) encode_8(to, i, to.d); else encode_4(to, i, to.d);
    if (to.rotated) rotate(to.d);
    if (to.key_scale) multiply(to.key_scale, to.d);
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(int d, F&& f) {
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int channel = j * CODE_GROUP + threadIdx.x % 32;
      if (channel < d) f(x[j], channel);
    }
  }

  // NaN stays: a row that holds one is not a number.
  static __device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }
  static __device__ __forceinline__ float largest(float x) {
    for (int i = 16; i > 0; i /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
  }

  __device__ __forceinline__ void encode_8(const CodedRows& to, int64_t i, int d) {
    float top = 0.f;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) top = larger(top, fabsf(x[j]));
    top = largest(top);
    const float scale = top / 127.f, inverse = top > 0.f ? 127.f / top : 0.f;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const int channel = j * CODE_GROUP + threadIdx.x % 32, code = int(roundf(x[j] * inverse));
      if (i >= 0 && channel < d) to.row(i)[byte_of(channel)] = uint8_t(code);
      x[j] = float(code) * scale;
    }
    if (i >= 0 && threadIdx.x % 32 == 0) to.scales(i)[0] = __float_as_uint(scale);
  }

  __device__ __forceinline__ void encode_4(const CodedRows& to, int64_t i, int d) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      if (j * CODE_GROUP >= d) break;
      const bool is_channel = j * CODE_GROUP + lane < d;
      const float high = largest(is_channel ? x[j] : -INFINITY), low = -largest(is_channel ? -x[j] : -INFINITY);
      const __half2 word = __halves2half2(__float2half_rn((high - low) / 15.f), __float2half_rn(low));
      const float2 scale = __half22float2(word);
      const float inverse = scale.x > 0.f ? 1.f / scale.x : 0.f;
      const int code = is_channel ? int(fminf(fmaxf(roundf((x[j] - scale.y) * inverse), 0.f), 15.f)) : 0;
      const int upper = __shfl_down_sync(0xffffffffu, code, 16);
      if (i >= 0 && lane < 16) to.row(i)[j * 16 + byte_of(lane)] = uint8_t(code | upper << 4);
      if (i >= 0 && lane == 0) to.scales(i)[j] = reinterpret_cast<const uint32_t&>(word);
      x[j] = fmaf(float(code), scale.x, scale.y);
    }
  }
};

// A value to (row, col) of a tile.
template <class TILE>
__device__ __forceinline__ void store_one(TILE tile, int row, int col, float x) {
  uint32_t word[TILE::P];
  split<TILE::P>(x, 0.f, word);
#pragma unroll
  for (int p = 0; p < TILE::P; p++)
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(tile.at(p, row, col & ~7) + (col & 7) * 2), "h"(uint16_t(word[p])) : "memory");
}

// Eight values to (row, col) of a tile.
template <class TILE>
__device__ __forceinline__ void store_eight(TILE tile, int row, int col, const float (&x)[8]) {
  uint32_t word[4][TILE::P];
#pragma unroll
  for (int i = 0; i < 4; i++) split<TILE::P>(x[2 * i], x[2 * i + 1], word[i]);
#pragma unroll
  for (int p = 0; p < TILE::P; p++) store_shared(tile.at(p, row, col), make_uint4(word[0][p], word[1][p], word[2][p], word[3][p]));
}

}  // namespace still
