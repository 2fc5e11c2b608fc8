// The Self-Saliency Score of a token from its local softmax.
#pragma once

namespace still {

// sigma = r ln r + p ln(1 + p / eps), eps = 1e-8, p = self / (rest + self), r = rest / (rest + self). `self`: the token's own
// weight, `rest`: the sum of the others'. 1 - p would cancel.
__device__ __forceinline__ float self_saliency(float rest, float self) {
  const float all = rest + self, p = self / all, r = rest / all;
  return (r > 0.f ? r * logf(r) : 0.f) + p * log1pf(p * 1e8f);
}

}  // namespace still
