// RoPE inside the kernels of a decode step: rows are rotated where they are read.
#pragma once
#include "values.cuh"

namespace still {

constexpr int EIGHT = 8;

template <class T>
__device__ __forceinline__ void load_values(float (&to)[EIGHT], const T* from) {
#pragma unroll
  for (int i = 0; i < EIGHT; i += Pack<T>::COUNT) {
    const auto pack = load_pack(from + i);
#pragma unroll
    for (int j = 0; j < Pack<T>::COUNT; j++) to[i + j] = pack.value[j];
  }
}

template <class T>
__device__ __forceinline__ void store_values(T* to, const float (&from)[EIGHT]) {
#pragma unroll
  for (int i = 0; i < EIGHT; i += Pack<T>::COUNT) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::COUNT; j++) pack.value[j] = from[i + j];
    store_pack(to + i, pack);
  }
}

// The angles of a sequence's token, for rows of which the first 2 `half` channels are rotated.
struct StepRope {
  const float *cos, *sin;  // null: rows have been rotated
  int half;
};

// Channels `col..` of a row after RoPE.
template <class T>
__device__ __forceinline__ void rotate_piece(float (&y)[EIGHT], const T* row, int col, const StepRope& rope) {
  const int half = rope.half;
  load_values(y, row + col);
  if (col >= 2 * half) return;
  const bool is_upper = col >= half;
  const int angle = is_upper ? col - half : col;
  float other[EIGHT], cos[EIGHT], sin[EIGHT];
  load_values(other, row + (is_upper ? angle : angle + half));
  load_values(cos, rope.cos + angle);
  load_values(sin, rope.sin + angle);
#pragma unroll
  for (int i = 0; i < EIGHT; i++) y[i] = y[i] * cos[i] + (is_upper ? other[i] : -other[i]) * sin[i];
}

// One channel of a row after RoPE, as it would lie in memory.
template <class T>
__device__ __forceinline__ float rotated_value(const T* row, int i, const StepRope& rope) {
  const float x = float(row[i]);
  if (!rope.cos || i >= 2 * rope.half) return x;
  const bool is_upper = i >= rope.half;
  const int angle = is_upper ? i - rope.half : i;
  const float other = float(row[is_upper ? angle : angle + rope.half]);
  return float(T(x * rope.cos[angle] + (is_upper ? other : -other) * rope.sin[angle]));
}

}  // namespace still
