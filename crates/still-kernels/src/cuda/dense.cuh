// From a shape to the kernels of dense attention, which take more head dimensions than the hybrid's.
#pragma once
#include "dense.h"
#include "launch.cuh"

namespace still {

// Calls `f(Kind<T, D>{})`; an error if the shape has no kernel.
template <bool WIDE, class F>
int dense_dispatch(const StillShape& s, F f) {
  if (!valid(s)) return cudaErrorInvalidValue;
  auto by_dim = [&](auto t) -> int {
    using T = decltype(t);
    switch (s.head_dim) {
#ifdef STILL_QUICK  // one kind, to look at its machine code
      case 128: return sizeof(T) == 2 ? f(Kind<__nv_bfloat16, 128>{}) : cudaErrorInvalidValue;
#else
      case 64: return f(Kind<T, 64>{});
      case 80: return f(Kind<T, 80>{});
      case 96: return f(Kind<T, 96>{});
      case 128: return f(Kind<T, 128>{});
      case 256:
        if constexpr (WIDE) return f(Kind<T, 256>{});
        return cudaErrorInvalidValue;
#endif
      default: return cudaErrorInvalidValue;
    }
  };
  return s.dtype == STILL_BF16 ? by_dim(__nv_bfloat16{}) : by_dim(float{});
}

}  // namespace still
