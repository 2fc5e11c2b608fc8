// From a shape to the kernels of dense attention, which take more head dimensions than the hybrid's.
#pragma once
#include "dense.h"
#include "launch.cuh"

namespace still {

template <class F>
int dense_dispatch(const StillShape& s, F f) {
  return dispatch_dims<64, 80, 96, 128, 256>(s, f);
}

}  // namespace still
