// Scores of tokens by routers other than self-saliency.
#pragma once
#include "launch.cuh"

namespace still {

// As `still_compute::random::uniform`: a hash of a seed and three words, in [0, 1).
__device__ __forceinline__ double hashed(uint64_t seed, uint64_t a, uint64_t b, uint64_t c) {
  constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;
  auto hash = [](uint64_t state, uint64_t word) {  // the finaliser of SplitMix64
    uint64_t z = (state ^ word * GOLDEN) + GOLDEN;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
  };
  return double(hash(hash(hash(seed, a), b), c) >> 11) / double(1ull << 53);
}

// By a token's position alone. Routers for which more matters than that rank by 0 until they know.
__device__ __forceinline__ float position_score(const StillRouter& router, int head, int position) {
  switch (router.kind) {
    case STILL_FIRST_TOKENS: return -float(position);
    case STILL_RANDOM: return float(hashed(router.seed, router.layer, head, position));
    default: return 0.f;
  }
}

// Queries of one head from which token `t` of a sequence has received attention: the later ones of its chunk and the next.
__device__ __forceinline__ int givers(int t, int tokens) { return max(min(tokens, (t / CHUNK + 2) * CHUNK) - t - 1, 0); }

// The router's score of a token from what it has received of `group` query heads, and back.
__device__ __forceinline__ float received_mean(float sum, int t, int tokens, int group) { return sum / (max(givers(t, tokens), 1) * group); }

// What a ring holds of a token with this score.
__device__ __forceinline__ float ring_score(const StillRouter& router, float score, int t, int tokens, int group) {
  return router.kind == STILL_RECEIVED_ATTENTION ? score * (max(givers(t, tokens), 1) * group) : score;
}

}  // namespace still
