// Keys of a head that keeps every token, in 4 bits: each channel of 32 keys has a scale and an offset of its own, in place of each 32
// channels of a key. They take as many bytes as rows do. Of 32 keys, channel c has word c and bytes 16 c to 16 c + 15: byte i has key i low
// and key i + 16 high. Nothing is rotated.
#pragma once
#include "codes.cuh"

namespace still {

// Whether a head's keys are kept so.
__host__ __device__ constexpr bool by_channel(int coding, int d, int cap, int budget) {
  return coding == STILL_INT4 && d % CODE_GROUP == 0 && keeps_all(cap, budget);
}

// A channel of 32 keys, in the registers of a thread.
struct KeyChannel {
  float x[CODE_GROUP];

  // `at` finds the value of key i.
  template <class AT>
  __device__ __forceinline__ void load(AT&& at) {
#pragma unroll
    for (int i = 0; i < CODE_GROUP; i++) x[i] = float(at(i));
  }

  // What the codes of keys `first` to `first` + 31 stand for.
  __device__ __forceinline__ void decode(const CodedRows& from, int64_t first, int channel) {
    const uint4 codes = reinterpret_cast<const uint4*>(from.row(first))[channel];
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    const float2 scale = scale_and_offset(from.scales(first)[channel]);
    const float by = from.key_scale ? from.key_scale[channel] : 1.f;
#pragma unroll
    for (int i = 0; i < CODE_GROUP; i++) x[i] = fmaf(float(words[i % 16 / 4] >> shift(i) & 15), scale.x, scale.y) * by;
  }

  // Becomes what its codes stand for. They go to keys `first` to `first` + 31 of `to`, or nowhere if that is negative.
  __device__ __forceinline__ void encode(const CodedRows& to, int64_t first, int channel) {
    const float by = to.key_scale ? to.key_scale[channel] : 1.f;
    float high = -INFINITY, low = -INFINITY;  // the second of what is negated
#pragma unroll
    for (int i = 0; i < CODE_GROUP; i++) {
      x[i] /= by;
      high = larger(high, x[i]);
      low = larger(low, -x[i]);
    }
    const __half2 word = __halves2half2(__float2half_rn((high + low) / 15.f), __float2half_rn(-low));
    const float2 scale = __half22float2(word);
    const float inverse = scale.x > 0.f ? 1.f / scale.x : 0.f;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < CODE_GROUP; i++) {
      const uint32_t code = uint32_t(fminf(fmaxf(roundf((x[i] - scale.y) * inverse), 0.f), 15.f));
      words[i % 16 / 4] |= code << shift(i);
      x[i] = fmaf(float(code), scale.x, scale.y) * by;
    }
    if (first < 0) return;
    reinterpret_cast<uint4*>(to.row(first))[channel] = make_uint4(words[0], words[1], words[2], words[3]);
    to.scales(first)[channel] = reinterpret_cast<const uint32_t&>(word);
  }

 private:
  static __device__ __forceinline__ int shift(int i) { return i % 4 * 8 + i / 16 * 4; }
  // NaN stays: a channel that holds one is not a number.
  static __device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }
};

// Codes `count` keys, whole groups, from key `first` of a store on. `row` finds each; the thread is one of `threads`.
template <class ROW>
__device__ __forceinline__ void encode_keys(const CodedRows& to, int64_t first, int count, int thread, int threads, ROW&& row) {
  for (int i = thread; i < count / CODE_GROUP * to.d; i += threads) {
    const int group = i / to.d * CODE_GROUP, channel = i % to.d;
    KeyChannel keys;
    keys.load([&](int t) { return row(group + t)[channel]; });
    keys.encode(to, first + group, channel);
  }
}

// A channel of 32 keys to rows `row` to `row` + 31 of a tile. Lanes of a warp have neighbouring channels: no bank conflicts.
template <class TILE>
__device__ __forceinline__ void store_key_channel(TILE tile, int row, int channel, uint4 codes, uint32_t word) {
  const uint32_t raw[4] = {codes.x, codes.y, codes.z, codes.w};
  const float2 scale = scale_and_offset(word);
  const float offset = scale.y - 128.f * scale.x;
#pragma unroll
  for (int i = 0; i < CODE_GROUP; i++) {  // 128 + code, as f32: no conversion of integers, as in store_codes_4
    const uint32_t code = (raw[i % 16 / 4] >> (i % 4 * 8 + i / 16 * 4) & 15) | 0x4300;
    store_one(tile, row + i, channel, fmaf(__uint_as_float(code << 16), scale.x, offset));
  }
}

}  // namespace still
