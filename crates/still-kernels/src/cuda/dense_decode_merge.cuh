// What the blocks of a dense decode step leave, and how it becomes the output.
#pragma once
#include "dense_decode_block.cuh"
#include "last_block.cuh"

namespace still {

// Floats of one block's partial result, a multiple of four: numerators [heads, D], then maxima and sums [2, heads].
__host__ __device__ inline int64_t partial_floats(int group, int d) {
  return int64_t((group < GROUP ? group : GROUP) * (d + 2) + 3) / 4 * 4;
}

// What the block has for each query head.
struct DenseScratch {
  WarpStats<false> warps;
  float maximum[GROUP], sum[GROUP];
};

// Brings the four warps' sums to the block's maximum and leaves their numerators as [4, heads, D].
template <class K>
__device__ __forceinline__ void merge_warps(const OnlineSoftmax<K::D / 8>& mine, int heads, float* numerators, DenseScratch& scratch) {
  scratch.warps.leave(mine);
  copy_wait<0>();
  __syncthreads();
  scratch.warps.leave_numerators(mine, heads, numerators + threadIdx.x / 32 * heads * K::D, K::D);
  if (int(threadIdx.x) < heads) {
    const int row = threadIdx.x;
    const float top = scratch.warps.largest(row);
    scratch.maximum[row] = top;
    scratch.sum[row] = scratch.warps.sum(row, top);
  }
  __syncthreads();
}

__device__ __forceinline__ void add(float4& to, float4 x, float weight) {
  to.x += x.x * weight;
  to.y += x.y * weight;
  to.z += x.z * weight;
  to.w += x.w * weight;
}

__device__ __forceinline__ void store_four(float* to, float4 x, float factor) {
  *reinterpret_cast<float4*>(to) = make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}
__device__ __forceinline__ void store_four(__nv_bfloat16* to, float4 x, float factor) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack(x.x * factor, x.y * factor), pack(x.z * factor, x.w * factor));
}

// What a thread has of a column of four channels: the sum of numerators, and the largest logit and sum of weights of its row.
struct ColumnSum {
  float4 sum;
  float2 top;
};

// One column of every `ways`-th block's partial result from `first` on, added up in order. Loads of BATCH blocks are in flight at a time.
template <int D>
__device__ __forceinline__ ColumnSum add_column(const DensePlace& at, const float* partial, int64_t stride, int column, int first, int ways) {
  constexpr int BATCH = 16;
  const int row = column * 4 / D;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  float top = -INFINITY, all = 0.f;
  for (; first < at.used; first += BATCH * ways) {
    float4 x[BATCH];
    float m[BATCH], shares[BATCH], raised = top;
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int part = first + j * ways;
      const float *from = partial + min(part, at.used - 1) * stride, *stats = from + at.heads * D + row;
      x[j] = __ldcg(reinterpret_cast<const float4*>(from) + column);
      m[j] = part < at.used ? __ldcg(stats) : -INFINITY;
      shares[j] = __ldcg(stats + at.heads);
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) raised = fmaxf(raised, m[j]);
    const float shrink = exp2f(top - raised);
    sum = make_float4(sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink);
    all *= shrink;
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const float weight = exp2f(m[j] - raised);
      add(sum, x[j], weight);
      all += shares[j] * weight;
    }
    top = raised;
  }
  return {sum, make_float2(top, all)};
}

// The output from all blocks' partial results, each `stride` floats behind the one before. A thread adds up four channels; where
// there are fewer columns than threads, several share a column's blocks.
template <class K>
__device__ __forceinline__ void merge_blocks(const DenseDecode<typename K::T>& in, const DensePlace& at, const float* partial,
                                             int64_t stride, float* floats) {
  constexpr int D = K::D;
  const int columns = at.heads * D / 4, ways = max(1, DECODE_THREADS / columns);
  float4* const sums = reinterpret_cast<float4*>(floats);
  float2* const tops = reinterpret_cast<float2*>(floats + DenseMemory<K>::TOPS);  // maxima and sums of weights
  for (int i = threadIdx.x; i < columns * ways; i += DECODE_THREADS) {
    const ColumnSum own = add_column<D>(at, partial, stride, i % columns, i / columns, ways);
    sums[i] = own.sum;
    tops[i] = own.top;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += DECODE_THREADS) {
    float top = -INFINITY, all = 0.f;
    for (int way = 0; way < ways; way++) top = fmaxf(top, tops[way * columns + i].x);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int way = 0; way < ways; way++) {
      const float2 own = tops[way * columns + i];
      const float weight = exp2f(own.x - top);
      add(sum, sums[way * columns + i], weight);
      all += own.y * weight;
    }
    store_four(in.out.row(at.b, at.head + i * 4 / D, 0) + i * 4 % D, sum, 1.f / all);
  }
}

// A block's own result: the output if it has all tokens, else its part for the last block.
template <class K>
__device__ __forceinline__ void leave_block(const DenseDecode<typename K::T>& in, const DensePlace& at, const float* floats,
                                            const DenseScratch& scratch, float* own) {
  constexpr int D = K::D;
  const int columns = at.heads * D / 4;
  const float4* warps = reinterpret_cast<const float4*>(floats);
  for (int i = threadIdx.x; i < columns; i += DECODE_THREADS) {
    float4 sum = warps[i];
    for (int w = 1; w < DECODE_WARPS; w++) add(sum, warps[w * columns + i], 1.f);
    const int row = i * 4 / D;
    if (at.used == 1) store_four(in.out.row(at.b, at.head + row, 0) + i * 4 % D, sum, 1.f / scratch.sum[row]);
    else reinterpret_cast<float4*>(own)[i] = sum;
  }
  if (at.used > 1 && int(threadIdx.x) < at.heads) {
    own[at.heads * D + threadIdx.x] = scratch.maximum[threadIdx.x];
    own[at.heads * (D + 1) + threadIdx.x] = scratch.sum[threadIdx.x];
  }
}

}  // namespace still
