// Running sums of products over chunks: sum_t phi_t x_t' and sum_t w_t phi_t, forwards (the prefix states) or backwards
// (the gradients of those states).
//
// One block owns 64 features of one (sequence, KV head, segment of chunks) and walks the segment with the sum in
// registers. A first pass adds up each segment alone, the second starts from the segments before and writes every entry.
#pragma once
#include "scan_block.cuh"

namespace still {

template <class K, bool TOTALS, bool GATHER>
__global__ void __launch_bounds__(128) state_scan(const StateScan<typename K::T> scan) {
  constexpr int D = K::D, P = K::P, NT = D / 8, STAGES = 3;
  using Phi = Tile<P, CHUNK, 64>;
  using X = Tile<P, CHUNK, D>;
  extern __shared__ unsigned char memory[];
  __shared__ __align__(16) float weights[STAGES][CHUNK];
  const uint32_t base = aligned(memory);
  const ScanBlock<typename K::T, D> at(scan);
  if (keeps_all(scan.routing.cap, scan.routing.budgets[at.kv])) return;
  const bool mine = at.has_features();
  auto phi_of = [&](int step) { return Phi{base + step % STAGES * (Phi::BYTES + X::BYTES)}; };
  auto load = [&](int step) {
    if (step < at.steps) {
      const Phi phi = phi_of(step);
      at.template load<GATHER>(step, phi, X{phi.base + Phi::BYTES}, weights[step % STAGES]);
    }
    copy_commit();
  };

  float sum[NT][4], z[4] = {0.f, 0.f, 0.f, 0.f};
  clear(sum);
  load(0);
  load(1);
  if (!TOTALS && at.segment > 0 && mine) at.begin_with_totals(sum, z);
  if (at.segment == 0 && scan.s_first && mine) at.template begin_with_first<!TOTALS>(sum, z);
  for (int step = 0; step < at.steps; step++) {
    copy_wait<1>();
    publish();
    __syncthreads();
    load(step + 2);
    const Phi phi = phi_of(step);
    Left<P> a[4];
#pragma unroll
    for (int k = 0; k < 4; k++) load_left_transposed(a[k], phi, k * 16, threadIdx.x / 32 * 16);
    add_outer_product(sum, a, phi, X{phi.base + Phi::BYTES});
    add_weighted(z, a, scan.weight ? weights[step % STAGES] : nullptr);
    if (!TOTALS && (step + 1) % scan.group == 0 && mine) at.leave_entry(at.slot_of(step), sum, z);
  }
  if (TOTALS && mine) at.leave_total(sum, z);
}

// Totals of single segments become sums of all up to each.
static __global__ void __launch_bounds__(256) add_totals(float* s_totals, int64_t s_size, float* z_totals, int64_t z_size, int segments) {
  int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const bool is_z = i >= s_size;
  float* totals = is_z ? z_totals : s_totals;
  const int64_t size = is_z ? z_size : s_size;
  if (is_z) i -= s_size;
  if (i >= size) return;
  float sum = 0.f;
#pragma unroll 4
  for (int s = 0; s < segments; s++) totals[s * size + i] = sum += totals[s * size + i];
}

template <class K, bool GATHER>
int run_state_scan(const StillShape& shape, const StateScan<typename K::T>& scan, StillStream stream) {
  if (scan.entries() == 0) return cudaSuccess;
  constexpr int bytes = 3 * (Tile<K::P, CHUNK, 64>::BYTES + Tile<K::P, CHUNK, K::D>::BYTES) + ALIGNMENT;
  const unsigned states = shape.batch * shape.kv_heads;
  if (scan.segments > 1) {  // nothing starts from the last segment's total
    int error = launch(state_scan<K, true, GATHER>, dim3((2 * K::D + 63) / 64, scan.segments - 1, states), 128, bytes, stream, scan);
    const int64_t zs = int64_t(states) * 2 * K::D, sums = zs * K::D;
    if (!error)
      error = launch(add_totals, dim3((sums + zs + 255) / 256), 256, 0, stream, scan.totals, sums, scan.totals + scan.segments * sums, zs, scan.segments - 1);
    if (error) return error;
  }
  return launch(state_scan<K, false, GATHER>, dim3((2 * K::D + 63) / 64, scan.segments, states), 128, bytes, stream, scan);
}

}  // namespace still
