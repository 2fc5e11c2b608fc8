// What the two passes of the forward share.
#pragma once
#include "launch.cuh"

namespace still {

template <class T>
struct Forward {
  Rows<const T> q, k, v, gate;
  Rows<T> out, linear;
  const T *w_q, *s;
  const float *log_scale, *z;
  StillRouting routing;
  float *maximum, *denominator;
  int32_t* arg_max;
  const int32_t *gate_from, *gate_until;
  int tokens, heads, kv_heads, group, chunks, first_chunk, flags;

  Forward(const StillShape& shape, const StillForward& a)
      : q(a.q), k(a.k), v(a.v), gate(a.gate), out(a.out), linear(a.linear), w_q(static_cast<const T*>(a.w_q)), s(static_cast<const T*>(a.s)),
        log_scale(a.log_scale), z(a.z), routing(a.routing), maximum(a.maximum), denominator(a.denominator),
        arg_max(a.arg_max), gate_from(a.gate_from), gate_until(a.gate_until), tokens(shape.tokens), heads(shape.heads), kv_heads(shape.kv_heads),
        group(shape.heads / shape.kv_heads), chunks(still::chunks(shape)), first_chunk(a.first_chunk), flags(shape.flags) {}
};

}  // namespace still
