// From a shape to the kernels of dense attention, which take more head dimensions than the hybrid's.
#pragma once
#include "dense.h"
#include "launch.cuh"

namespace still {

// As `dispatch`; with head dimension 256 if `WIDE`.
template <bool WIDE, class F>
int dense_dispatch(const StillShape& s, F f) {
  if constexpr (WIDE)
    return dispatch_dims<64, 80, 96, 128, 256>(s, f);
  else
    return dispatch_dims<64, 80, 96, 128>(s, f);
}

}  // namespace still
