// Codes on their way from memory to a tile of 64 keys and 64 values.
#pragma once
#include "channel_codes.cuh"

namespace still {

__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {  // of bf16
  const __nv_bfloat162 x = __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(x);
}

// Four codes of 8 bits as two words of bf16, exactly. 0x4300 and seven bits more are 128 + x; a code is x, or x - 128 where its highest
// bit is set. No conversion of integers: those run at a quarter of the speed.
__device__ __forceinline__ uint2 widen_8(uint32_t codes) {
  const uint32_t odd = codes >> 8;
  return make_uint2(subtract_pairs((codes & 0x007f007f) | 0x43004300, (codes & 0x00800080) | 0x43004300),
                    subtract_pairs((odd & 0x007f007f) | 0x43004300, (odd & 0x00800080) | 0x43004300));
}

// Sixteen codes of 8 bits, `piece` of its row, to (row, …) of a tile: without their scale.
template <class TILE>
__device__ __forceinline__ void store_codes_8(TILE tile, int row, int piece, uint4 codes) {
  const bool swapped = piece & 4;  // lanes of neighbouring panels begin with different halves: no bank conflicts
  const uint2 half[2] = {swapped ? make_uint2(codes.z, codes.w) : make_uint2(codes.x, codes.y),
                         swapped ? make_uint2(codes.x, codes.y) : make_uint2(codes.z, codes.w)};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint2 low = widen_8(half[i].x), high = widen_8(half[i].y);
    const int col = piece * 16 + (i ^ swapped) * 8;
    store_shared(tile.at(0, row, col), make_uint4(low.x, low.y, high.x, high.y));
    if constexpr (TILE::P == 2) store_shared(tile.at(1, row, col), make_uint4(0, 0, 0, 0));
  }
}

// 32 codes of 4 bits, a group of its row, to (row, …) of a tile as values.
template <class TILE>
__device__ __forceinline__ void store_codes_4(TILE tile, int row, int group, uint4 codes, uint32_t word) {
  uint32_t raw[4] = {codes.x, codes.y, codes.z, codes.w};
  const int swapped = group & 2;  // lanes of neighbouring panels begin with different halves
  if (swapped)
#pragma unroll
    for (int i = 0; i < 4; i++) raw[i] = (raw[i] >> 4 & 0x0f0f0f0f) | (raw[i] << 4 & 0xf0f0f0f0);
  const float2 scale = scale_and_offset(word);
  const float offset = scale.y - 128.f * scale.x;
#pragma unroll
  for (int part = 0; part < 4; part++) {
    float x[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // 128 + code, as f32: of bf16 the upper half
      const uint32_t two = (raw[part % 2 * 2 + i / 2] >> (part / 2 * 4 + i % 2 * 8) & 0x000f000f) | 0x43004300;
      x[2 * i] = fmaf(__uint_as_float(two << 16), scale.x, offset);
      x[2 * i + 1] = fmaf(__uint_as_float(two & 0xffff0000u), scale.x, offset);
    }
    const int col = group * CODE_GROUP + (part ^ swapped) * 8;
    if (TILE::COLS % CODE_GROUP == 0 || col < TILE::COLS) store_eight(tile, row, col, x);
  }
}

// Codes that 128 threads fetch while the tile before is used, and widen when that is done. Those of 8 bits are widened without
// their scales, which logits (of keys) and weights (of values) are multiplied by.
template <class K, int CODING>
struct CodesAhead {
  static constexpr int PIECES = code_bytes(CODING, K::D) / 16, WORDS = code_words(CODING, K::D);  // of a row
  static constexpr int EACH = WORDS == 1 ? 1 : PIECES;
  uint4 codes[PIECES];
  uint32_t words[EACH];

  // 64 rows from `from` on, of which `valid` exist.
  __device__ __forceinline__ void fetch(const CodedRows& keys, const CodedRows& values, int64_t from, int valid) {
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const int i = threadIdx.x + j * 128, row = i / PIECES % CHUNK, piece = i % PIECES;
      const uint4* const rows = reinterpret_cast<const uint4*>(i / PIECES < CHUNK ? keys.codes : values.codes);
      codes[j] = row < valid ? rows[(from + row) * PIECES + piece] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = threadIdx.x + j * 128, row = i / EACH % CHUNK;
      const uint32_t* const scales = i / EACH < CHUNK ? keys.words : values.words;
      words[j] = row < valid ? scales[(from + row) * WORDS + i % EACH] : 0;
    }
  }
  // `channels`: keys are coded by channel.
  template <class STAGE>
  __device__ __forceinline__ void place(STAGE to, float* scales, bool channels = false) const {
    if constexpr (CODING == STILL_INT8) scales[threadIdx.x] = __uint_as_float(words[0]);
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const int i = threadIdx.x + j * 128;
      if constexpr (CODING == STILL_INT8) {
        store_codes_8(to, i / PIECES, i % PIECES, codes[j]);
      } else if (channels && i < PIECES * CHUNK) {
        store_key_channel(to, i / K::D * CODE_GROUP, i % K::D, codes[j], words[j]);
      } else {
        store_codes_4(to, i / PIECES, i % PIECES, codes[j], words[j]);
      }
    }
  }
};

// Rows as they come are copied past the registers.
template <class K>
struct CodesAhead<K, STILL_PLAIN> {
  __device__ __forceinline__ void fetch(const CodedRows&, const CodedRows&, int64_t, int) {}
  template <class STAGE>
  __device__ __forceinline__ void place(STAGE, float*, bool = false) const {}
};

}  // namespace still
