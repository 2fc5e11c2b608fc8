// Codes on their way from memory to a tile of 64 keys and 64 values.
#pragma once
#include "channel_codes.cuh"

namespace still {

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
