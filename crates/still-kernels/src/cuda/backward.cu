// The backward pass: seven steps.
#include "backward_steps.cuh"
#include "states.cuh"

namespace still {

int step_states(const StillShape& shape, const StillBackward& args, StillStream stream) {
  return dispatch(shape, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    Backward<T> in(shape, args, args.host_budgets);
    StateScan<T> scan{in.phi_q, in.d_linear, in.minus_delta, in.totals, in.d_s, in.d_z, nullptr, nullptr, shape.tokens, shape.heads, shape.kv_heads,
                      in.group, retired(shape), in.segments, in.routing, true};
    return run_state_scan<K, false>(shape, scan, stream);
  });
}

}  // namespace still

extern "C" int64_t still_backward_bytes(const StillShape* shape, const int32_t* host_budgets) {
  int64_t bytes = -1;
  still::dispatch(*shape, [&](auto kind) -> int {
    bytes = still::Backward<typename decltype(kind)::T>(*shape, StillBackward{}, host_budgets).bytes;
    return 0;
  });
  return bytes;
}

extern "C" int still_backward_step(const StillShape* shape, const StillBackward* args, int32_t step, StillStream stream) {
  switch (step) {
    case STILL_STEP_LINEAR: return still::step_linear(*shape, *args, stream);
    case STILL_STEP_QUERIES: return still::step_queries(*shape, *args, stream);
    case STILL_STEP_WINDOW: return still::step_window(*shape, *args, stream);
    case STILL_STEP_SALIENT: return still::step_salient(*shape, *args, stream);
    case STILL_STEP_STATES: return still::step_states(*shape, *args, stream);
    case STILL_STEP_ABSORBED: return still::step_absorbed(*shape, *args, stream);
    case STILL_STEP_MAPS: return still::step_maps(*shape, *args, stream);
    default: return cudaErrorInvalidValue;
  }
}

extern "C" int still_backward(const StillShape* shape, const StillBackward* args, StillStream stream) {
  for (int32_t step = 0; step < STILL_STEPS; step++)
    if (int error = still_backward_step(shape, args, step, stream)) return error;
  return 0;
}
