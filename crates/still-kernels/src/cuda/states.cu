// The prefix states S and z.
#include "states.cuh"

extern "C" int still_segments(const StillShape* shape) { return still::segments(*shape); }

extern "C" int still_states(const StillShape* shape, const void* phi, StillRows v, const StillRouting* routing, float* totals, void* s, float* z,
                            float* s_last, float* z_last, const StillPast* past, StillStream stream) {
  return still::dispatch_forward(*shape, [&](auto kind) {
    using K = decltype(kind);
    using T = typename K::T;
    still::StateScan<T> scan{static_cast<const T*>(phi), still::Rows<const T>(v), nullptr, totals, static_cast<T*>(s), z, s_last, z_last,
                             shape->tokens, shape->kv_heads, shape->kv_heads, 1, still::retired(*shape),
                             still::segments(*shape), *routing, false, past ? past->s : nullptr, past ? past->z : nullptr,
                             past ? past->tokens : nullptr};
    return routing->cap == STILL_NO_CAP ? still::run_state_scan<K, false>(*shape, scan, stream)
                                        : still::run_state_scan<K, true>(*shape, scan, stream);
  });
}
