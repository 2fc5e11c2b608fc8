// Dense attention of one token of every sequence. Blocks share the tokens of a (sequence, KV head); each attends for up to 16
// query heads at once, which are the rows of its products, and leaves a partial result. The last to arrive adds them up in order.
#pragma once
#include "dense_decode_merge.cuh"
#include "dense_decode_rows.cuh"

namespace still {

template <class K, bool EACH, int CODING>
__global__ void __launch_bounds__(DECODE_THREADS, DenseMemory<K>::BLOCKS) dense_decode(const DenseDecode<typename K::T> all) {
  constexpr int D = K::D;
  let_next_begin();
  const int position = all.positions[blockIdx.z];
  if (position < 0) return wait_for_previous();
  const DenseDecode<typename K::T>& in = all.template own<EACH>(blockIdx.z, D);
  const DensePlace at(in, position);
  if (int(blockIdx.x) >= at.used) return;
  extern __shared__ __align__(128) unsigned char dynamic[];
  __shared__ DenseScratch scratch;
  const DenseMemory<K> memory{shared_address(dynamic)};
  float* const floats = reinterpret_cast<float*>(dynamic);

  OnlineSoftmax<D / 8> sums;
  if constexpr (CODING != STILL_PLAIN) {
    attend_codes<K, CODING>(in, at, memory, sums);
  } else {
    attend_tiles<K>(in, at, memory, sums);
    // No block reads it from there in this step.
    for (int i = threadIdx.x; i < D && int(blockIdx.x) == at.used - 1; i += DECODE_THREADS) {
      if (!in.cos) in.keys.row(at.b, at.kv, position)[i] = in.k.row(at.b, at.kv, 0)[i];
      in.values.row(at.b, at.kv, position)[i] = in.v.row(at.b, at.kv, 0)[i];
    }
  }
  merge_warps<K>(sums, at.heads, floats, scratch);

  const int64_t stride = partial_floats(in.group, D);
  float* const partial = in.partial + at.row * in.splits * stride;
  leave_block<K>(in, at, floats, scratch, partial + blockIdx.x * stride);
  if (at.used > 1 && is_last_block(in.arrived + at.row, at.used)) merge_blocks<K>(in, at, partial, stride, floats);
}

// Of a cache whose rows are kept so.
template <int CODING>
int launch_dense_decode(const StillShape& shape, const StillDenseDecode& args, StillStream stream) {
  return dense_dispatch(shape, [&](auto kind) -> int {
    using K = decltype(kind);
    if constexpr (CODING == STILL_INT4 && K::P == 1) {
      return cudaErrorInvalidValue;  // rotated queries and keys rounded to bf16 cost more than a bf16 step may be off by
    } else {
      const DenseDecode<typename K::T> in(shape, args);
      const dim3 grid(in.splits, in.kv_heads * in.slices, shape.batch);
      return launch_early(args.caches ? dense_decode<K, true, CODING> : dense_decode<K, false, CODING>, grid, DECODE_THREADS,
                          DenseMemory<K>::BYTES, stream, in);
    }
  });
}

// The one of int8 and int4 rows, compiled apart.
int launch_dense_decode_codes(const StillShape& shape, const StillDenseDecode& args, StillStream stream);

}  // namespace still
