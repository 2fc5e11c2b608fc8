// Products of a small batch, blocks that stay: every block takes a part of the groups, all warps of it a part of the columns each.
#pragma once
#include "quantized.cuh"
#include "small_batch.cuh"
#include <type_traits>

namespace still {

enum Loader { REGISTERS, ASYNC, BULK };

struct StreamPlan {
  int planes, groups, round, x_bytes;
  uint32_t base;
  const void* next;
  int64_t next_bytes;
};

__device__ __forceinline__ void barrier_init(uint32_t at, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
__device__ __forceinline__ void barrier_expect(uint32_t at, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory"); }
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\nbra again;\ndone:\n}" ::"r"(at), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ uint4 read_shared4(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ uint2 read_shared2(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}

// Prefetches this block's share of what comes next.
__device__ __forceinline__ void prefetch_next(const void* next, int64_t bytes) {
  constexpr int PIECE = 4096;
  const int64_t pieces = bytes / PIECE;
  const char* at = static_cast<const char*>(next);
  for (int64_t i = int64_t(threadIdx.x) * gridDim.x + blockIdx.x; i < pieces; i += int64_t(gridDim.x) * blockDim.x) bulk_prefetch(at + i * PIECE, PIECE);
}

// Columns of one row of x, by one warp, into the order of the lanes.
template <bool NORM>
__device__ __forceinline__ float stage_bf16(const __nv_bfloat16* x, const __nv_bfloat16* norm, int from, int to, int planes, int row, int columns, uint2* staged) {
  constexpr int EIGHTS = 2;
  float square = 0.f;
  for (int first = from + threadIdx.x % 32 * 8; first < to; first += EIGHTS * 32 * 8) {
    uint4 loaded[EIGHTS], by[EIGHTS];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int at = first + e * 256;
      loaded[e] = at < to ? *reinterpret_cast<const uint4*>(x + at) : make_uint4(0, 0, 0, 0);
      if (NORM) by[e] = at < to ? __ldg(reinterpret_cast<const uint4*>(norm + at)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      const int at = first + e * 256;
      if (at >= to) break;
      const uint32_t word[4] = {loaded[e].x, loaded[e].y, loaded[e].z, loaded[e].w}, scale[4] = {by[e].x, by[e].y, by[e].z, by[e].w};
      float value[8];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 two = unpack(word[i]);
        value[2 * i] = two.x, value[2 * i + 1] = two.y;
        if (NORM) {
          const float2 s = unpack(scale[i]);
          square += two.x * two.x + two.y * two.y;
          value[2 * i] *= s.x, value[2 * i + 1] *= s.y;
        }
      }
      const int block = (at - from) / BLOCK, four = at % BLOCK / 4;
      uint2* const place = staged + (block * columns + row * planes) * 8 + four % 4 * 2 + four / 4;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float* v = value + 4 * i;
        const uint2 high = make_uint2(pack(v[0], v[1]), pack(v[2], v[3]));
        place[2 * i] = high;
        if (planes == 2) {
          const float2 a = unpack(high.x), b = unpack(high.y);
          place[8 + 2 * i] = make_uint2(pack(v[0] - a.x, v[1] - a.y), pack(v[2] - b.x, v[3] - b.y));
        }
      }
    }
  }
  return square;
}

template <class F>
struct Slot {
  static constexpr int CODE_BYTES = F::CODES * 4, SCALE_BYTES = F::SCALES * 4, BYTES = CODE_BYTES + SCALE_BYTES;
};

// SLOTS: items (a column tile of TILES row tiles) that a warp has on their way. GATED: a group is a tile of either matrix.
template <class F, bool GATED, int WARPS, int SLOTS, int LOADER>
__global__ __launch_bounds__(WARPS * 32, 16 / WARPS) void streamed_products(const __grid_constant__ Products products, const StreamPlan plan) {
  constexpr int TILES = GATED ? 2 : 1, ITEM = TILES * Slot<F>::BYTES;
  extern __shared__ __align__(128) unsigned char bytes[];
  __shared__ float squares[WARPS][8];
  __shared__ uint64_t barriers[WARPS * SLOTS];
  const StillSmallBatchProducts& a = products.all;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane / 4;
  const int begin = int(int64_t(plan.groups) * blockIdx.x / gridDim.x), end = int(int64_t(plan.groups) * (blockIdx.x + 1) / gridDim.x);
  const int steps = column_tiles(a.inner), from = steps * warp / WARPS, to = steps * (warp + 1) / WARPS, own = to - from;
  const int items = (end - begin) * own;
  unsigned char* const ring = bytes + warp * SLOTS * ITEM;  // LOADER != REGISTERS
  const uint32_t ring_at = shared_address(ring), barrier_at = shared_address(barriers + warp * SLOTS);
  unsigned char* const rest = bytes + (LOADER == REGISTERS ? 0 : WARPS * SLOTS * ITEM);
  float* const partial = reinterpret_cast<float*>(rest + plan.x_bytes);  // [group of a round][tile][warp][16][rows]
  let_next();

  // Which matrix a group is of.
  auto find = [&](int group, int& which) {
    for (which = 0; which + 1 < (GATED ? 1 : a.count); which++) {
      const int tiles = row_tiles(products.factor[which].out);
      if (group < tiles) break;
      group -= tiles;
    }
    return group;
  };

  // The cursor of what is loaded.
  TileRow<F> rows[TILES];
  int load_group = begin, load_step = 0;
  auto point = [&]() {
    int which;
    const int tile = find(load_group, which);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      rows[t] = TileRow<F>(products.factor[which + t].weight, products.factor[which + t].out, a.inner, tile);
      rows[t].codes += int64_t(from) * F::CODES;
      rows[t].scales += int64_t(from) * F::SCALES;
    }
  };
  auto advance = [&]() {
#pragma unroll
    for (int t = 0; t < TILES; t++) rows[t].codes += F::CODES, rows[t].scales += F::SCALES;
    if (++load_step == own) {
      load_step = 0;
      load_group++;
      if (load_group < end) point();
    }
  };
  typename F::Codes codes[TILES][LOADER == REGISTERS ? SLOTS : 1];
  typename F::Scales scales[TILES][LOADER == REGISTERS ? SLOTS : 1];
  if (begin < end && own > 0) point();
  if constexpr (LOADER == BULK) {
    if (lane == 0)
      for (int i = 0; i < SLOTS; i++) barrier_init(barrier_at + i * 8, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
  }
  auto issue = [&](int slot) {
    if constexpr (LOADER == REGISTERS) {
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        F::load(codes[t][slot], rows[t].codes, lane);
        F::load(scales[t][slot], rows[t], 0, 0, lane);
      }
    } else if constexpr (LOADER == ASYNC) {
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const uint32_t at = ring_at + slot * ITEM + t * Slot<F>::BYTES;
#pragma unroll
        for (int i = 0; i < F::CODES / 128; i++) copy_async(at + i * 512 + lane * 16, rows[t].codes + i * 128 + lane * 4, true);
        if (lane < F::SCALES / 4) copy_async(at + Slot<F>::CODE_BYTES + lane * 16, rows[t].scales + lane * 4, true);
      }
    } else {
      if (lane == 0) {
        barrier_expect(barrier_at + slot * 8, ITEM);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          const uint32_t at = ring_at + slot * ITEM + t * Slot<F>::BYTES;
          bulk_copy(at, rows[t].codes, Slot<F>::CODE_BYTES, barrier_at + slot * 8);
          bulk_copy(at + Slot<F>::CODE_BYTES, rows[t].scales, Slot<F>::SCALE_BYTES, barrier_at + slot * 8);
        }
      }
    }
  };
#pragma unroll
  for (int i = 0; i < SLOTS; i++) {
    if (i < items) issue(i), advance();
    if constexpr (LOADER == ASYNC) copy_commit();
  }

  wait_before();
  // What is added to the first values of a thread.
  const int columns = a.rows * plan.planes;
  unsigned char* const own_x = rest + int64_t(from) * 2 * columns * 64;
  __syncwarp();
  for (int row = 0; row < a.rows; row++) {
    const auto* x = static_cast<const __nv_bfloat16*>(a.x) + int64_t(row) * a.inner;
    const auto* norm = static_cast<const __nv_bfloat16*>(a.norm);
    uint2* staged = reinterpret_cast<uint2*>(own_x);
    if (a.norm) {
      const float square = warp_sum(stage_bf16<true>(x, norm, from * 64, to * 64, plan.planes, row, columns, staged));
      if (lane == 0) squares[warp][row] = square;
    } else {
      stage_bf16<false>(x, norm, from * 64, to * 64, plan.planes, row, columns, staged);
    }
  }
  __syncwarp();

  const int stride = columns * 4, lane_place = (column < columns ? column : columns - 1) * 4 + lane % 4;
  const uint4* const x_of_lane = reinterpret_cast<const uint4*>(own_x) + lane_place;
  float sum[TILES][4] = {};
  int step = 0, group = begin, in_round = 0, first_of_round = begin;

  auto finish = [&](int count) {  // groups first_of_round .. + count
    __syncthreads();
    const int values = count * TILE_ROWS * a.rows;
    for (int i = threadIdx.x; i < values; i += WARPS * 32) {
      const int r = i % TILE_ROWS, g = i / TILE_ROWS % count, n = i / TILE_ROWS / count;
      int which;
      const int tile = find(first_of_round + g, which);
      const StillFactor& factor = products.factor[which];
      const int row = tile * TILE_ROWS + r;
      if (row >= factor.out) continue;
      const int64_t place = int64_t(n) * factor.out + row;
      const float add = factor.add ? to_f32(static_cast<const __nv_bfloat16*>(factor.add)[place]) : 0.f;
      float scale = 1.f;
      if (a.norm) {
        float square = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) square += squares[w][n];
        scale = rsqrtf(square / a.inner + a.eps);
      }
      float y[TILES];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        y[t] = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) y[t] += partial[(((g * TILES + t) * WARPS + w) * a.rows + n) * TILE_ROWS + r];
        y[t] *= scale;
      }
      float out = y[0];
      if constexpr (GATED) out = out / (1.f + __expf(-out)) * y[TILES - 1];
      out += add;
      if (a.to_dtype == STILL_F32)
        static_cast<float*>(factor.to)[place] = out;
      else
        from_f32(static_cast<__nv_bfloat16*>(factor.to) + place, out);
    }
  };
  auto flush = [&]() {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float* const to = partial + ((in_round * TILES + t) * WARPS + warp) * a.rows * TILE_ROWS + lane / 4;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float first = sum[t][2 * half], second = sum[t][2 * half + 1];
        if (plan.planes == 2) {
          if (lane % 4 < a.rows) to[lane % 4 * TILE_ROWS + half * 8] = first + second;
        } else {
          if (lane % 4 * 2 < a.rows) to[lane % 4 * 2 * TILE_ROWS + half * 8] = first;
          if (lane % 4 * 2 + 1 < a.rows) to[(lane % 4 * 2 + 1) * TILE_ROWS + half * 8] = second;
        }
        sum[t][2 * half] = sum[t][2 * half + 1] = 0.f;
      }
    }
    step = 0, group++;
    if (++in_round == plan.round && group < end) {
      finish(in_round);
      __syncthreads();
      first_of_round = group, in_round = 0;
    }
  };
  auto multiply = [&](const typename F::Codes (&c)[TILES], const typename F::Scales (&s)[TILES]) {
#pragma unroll
    for (int block = 0; block < 2; block++) {
      const uint4 x = x_of_lane[(step * 2 + block) * stride];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        Fragments weights;
        F::fragments(c[t], block, plan.base, weights);
        float product[4] = {};
        mma(product, weights[0], x.x, x.y);
        mma(product, weights[1], x.z, x.w);
#pragma unroll
        for (int k = 0; k < 4; k++) sum[t][k] += F::scale(s[t], k / 2, block, 1) * product[k];
      }
    }
  };

  const int prefetch_at = items > 2 * SLOTS ? items - 2 * SLOTS : 0;
  if constexpr (LOADER == REGISTERS) {
    for (int it = 0; it < items; it += SLOTS) {
      if (it <= prefetch_at && it + SLOTS > prefetch_at && plan.next_bytes) prefetch_next(plan.next, plan.next_bytes);
#pragma unroll
      for (int i = 0; i < SLOTS; i++) {
        if (it + i >= items) break;
        typename F::Codes c[TILES];
        typename F::Scales s[TILES];
#pragma unroll
        for (int t = 0; t < TILES; t++) c[t] = codes[t][i], s[t] = scales[t][i];
        multiply(c, s);
        if (it + i + SLOTS < items) issue(i), advance();
        if (++step == own) flush();
      }
    }
  } else {
    int slot = 0;
    uint32_t parity = 0;
    for (int it = 0; it < items; it++) {
      if (it == prefetch_at && plan.next_bytes) prefetch_next(plan.next, plan.next_bytes);
      if constexpr (LOADER == ASYNC) {
        copy_wait<SLOTS - 1>();
        __syncwarp();
      } else {
        barrier_wait(barrier_at + slot * 8, parity);
      }
      typename F::Codes c[TILES];
      typename F::Scales s[TILES];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const uint32_t at = ring_at + slot * ITEM + t * Slot<F>::BYTES;
        const uint4 low = read_shared4(at + lane * 16), high = read_shared4(at + 512 + lane * 16);
        c[t].rows[0][0] = low.x, c[t].rows[0][1] = low.y, c[t].rows[0][2] = low.z, c[t].rows[0][3] = low.w;
        c[t].rows[1][0] = high.x, c[t].rows[1][1] = high.y, c[t].rows[1][2] = high.z, c[t].rows[1][3] = high.w;
        const uint2 both = read_shared2(at + Slot<F>::CODE_BYTES + lane / 4 * 8);
        s[t].rows[0] = both.x, s[t].rows[1] = both.y;
      }
      __syncwarp();
      if (it + SLOTS < items) issue(slot), advance();
      if constexpr (LOADER == ASYNC) copy_commit();
      multiply(c, s);
      if (++step == own) flush();
      if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
  }
  if (own == 0)  // fewer columns than warps: zeros
    for (int i = lane; i < min(plan.round, end - begin) * TILES * a.rows * TILE_ROWS; i += 32) {
      const int per = a.rows * TILE_ROWS;
      partial[(i / per * WARPS + warp) * per + i % per] = 0.f;
    }
  if (begin < end) finish(own == 0 ? end - begin : in_round);
}

}  // namespace still
