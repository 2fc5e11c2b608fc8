// The steps of the backward pass and how its scratch is divided.
#pragma once
#include "backward.cuh"

namespace still {

// Shares of the chunks in a map's gradient.
inline int map_parts(const StillShape& s, int heads) {
  const int work = retired(s) * s.batch, wanted = (264 + heads - 1) / heads;
  return work < 1 ? 1 : wanted < work ? wanted : work;
}

template <class T>
Backward<T>::Backward(const StillShape& shape, const StillBackward& a, const int32_t* host_budgets)
    : q(a.q), k(a.k), v(a.v), out(a.out), d_out(a.d_out), linear(a.linear), d_linear(a.d_linear), d_q(a.d_q), d_k(a.d_k), d_v(a.d_v),
      d_gate(a.d_gate), w_q(static_cast<const T*>(a.w_q)),
      w_k(static_cast<const T*>(a.w_k)), phi_k(static_cast<const T*>(a.phi)), s(static_cast<const T*>(a.s)),
      log_scale(a.log_scale), z(a.z), denominator(a.denominator), maximum(a.maximum), 
      arg_max(a.arg_max), routing(a.routing), d_w_q(a.d_w_q), d_w_k(a.d_w_k), d_log_scale(a.d_log_scale),
      tokens(shape.tokens), heads(shape.heads), kv_heads(shape.kv_heads), group(shape.heads / shape.kv_heads),
      chunks(still::chunks(shape)), units(0), segments(still::segments(shape)), flags(shape.flags) {
  const int64_t d = shape.head_dim, slots = retired(shape), rows = int64_t(shape.batch) * heads * tokens;
  const int64_t states = int64_t(shape.batch) * kv_heads * 2 * d;
  for (int h = 0; h < kv_heads; h++) units += SalientWork(host_budgets[h], slots).units();
  char* base = static_cast<char*>(a.scratch);
  int64_t used = 0;
  auto take = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(base + used);
    used += (count * sizeof(*to) + 255) / 256 * 256;
  };
  take(minus_delta, rows);
  take(inner, rows);
  take(phi_q, rows * 2 * d);
  take(df_q, rows * d);
  take(df_k, int64_t(shape.batch) * kv_heads * tokens * d);
  take(totals, segments * states * (d + 1));
  take(d_s, states * slots * d);
  take(d_z, states * slots);
  take(partial, int64_t(shape.batch) * units * 2 * CHUNK * d);
  const int64_t parts_q = int64_t(map_parts(shape, heads)) * heads, parts_k = int64_t(map_parts(shape, kv_heads)) * kv_heads;
  take(d_w_parts, (parts_q > parts_k ? parts_q : parts_k) * d * d);
  bytes = used;
}

int step_linear(const StillShape&, const StillBackward&, StillStream);
int step_queries(const StillShape&, const StillBackward&, StillStream);
int step_window(const StillShape&, const StillBackward&, StillStream);
int step_salient(const StillShape&, const StillBackward&, StillStream);
int step_states(const StillShape&, const StillBackward&, StillStream);
int step_absorbed(const StillShape&, const StillBackward&, StillStream);
int step_maps(const StillShape&, const StillBackward&, StillStream);

}  // namespace still
