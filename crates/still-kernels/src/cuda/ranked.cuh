// Tokens by their scores, the highest first, ties to the earlier: the order of all routing.
#pragma once
#include "launch.cuh"

namespace still {

// NaN ranks last, so that a broken score cannot displace a sound one.
__device__ __forceinline__ float sound(float score) { return score == score ? score : -INFINITY; }

struct Ranked {
  float score;
  int token;
};

__device__ __forceinline__ bool is_before(Ranked a, Ranked b) { return a.score > b.score || (a.score == b.score && a.token < b.token); }

// How many of a ranked list, of which `at` gives any, come before x.
template <class At>
__device__ __forceinline__ int count_before_of(At at, int length, Ranked x) {
  int low = 0, high = length;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (is_before(at(middle), x)) low = middle + 1; else high = middle;
  }
  return low;
}
__device__ __forceinline__ int count_before(const Ranked* list, int length, Ranked x) {
  return count_before_of([list](int i) { return list[i]; }, length, x);
}

}  // namespace still
