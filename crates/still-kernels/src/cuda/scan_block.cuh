// What a block of the state scan has of the work, and its stages: features and x to shared memory, where sums begin, what they leave.
#pragma once
#include "launch.cuh"
#include "wgmma.cuh"

namespace still {

template <class T>
struct StateScan {
  const T* phi;          // [B, heads, N, 2D]
  Rows<const T> x;
  const float* weight;   // [B, heads, N], or null: ones
  float* totals;         // [segments, B, K, 2D, D], then [segments, B, K, 2D]
  T* s;                  // [B, K, R, 2D, D]
  float* z;              // [B, K, R, 2D]
  float *s_last, *z_last;  // f32 [B, K, 2D, D] and [B, K, 2D]: the last entry, to decode from; null if not wanted
  int tokens, heads, kv_heads, group, slots, segments;  // group: heads of `phi` and `x` that go into one state
  StillRouting routing;    // with GATHER its `order` names the rows of x that the rows of `phi` belong to
  bool backwards;          // entry c sums chunks c + 2 and later, not chunks up to c
  // The states that sequences continue, f32 [B, K, 2D, D] and [B, K, 2D], or null: the first entry then, of one more. They may be
  // where the last are left if there is one segment, whose block reads its part before it writes it.
  const float *s_first = nullptr, *z_first = nullptr;
  const int32_t* ends = nullptr;  // [B]: tokens of each sequence, with padding behind them; null: all

  // Entries of a head.
  __host__ __device__ int entries() const { return slots + (s_first != nullptr); }
  // The slot whose entry is a sequence's last; negative if it has none.
  __device__ __forceinline__ int last_slot(int b) const { return ends ? max((ends[b] + CHUNK - 1) / CHUNK - 2, 0) - 1 : slots - 1; }
};

// A block's part of a scan: 64 features of one (sequence, KV head, segment), by which steps it goes, and where its sums lie. A lane's
// sums are of two features, 8 apart.
template <class T, int D>
struct ScanBlock {
  const StateScan<T>& scan;
  int slice, segment, bk, b, kv;  // `slice`: the first feature
  int begin, end, steps;          // slots of the segment; a step is a slot's head
  int feature;                    // the lane's first

  __device__ __forceinline__ explicit ScanBlock(const StateScan<T>& scan)
      : scan(scan), slice(blockIdx.x * 64), segment(blockIdx.y), bk(blockIdx.z), b(bk / scan.kv_heads), kv(bk % scan.kv_heads),
        feature(slice + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {
    const int length = (scan.slots + scan.segments - 1) / scan.segments;
    begin = segment * length;
    end = min(begin + length, scan.slots);
    steps = max(end - begin, 0) * scan.group;
  }
  __device__ __forceinline__ int slot_of(int step) const {
    return scan.backwards ? scan.slots - 1 - (begin + step / scan.group) : begin + step / scan.group;
  }
  __device__ __forceinline__ int head_of(int step) const { return kv * scan.group + step % scan.group; }
  __device__ __forceinline__ int start_of(int step) const { return (slot_of(step) + (scan.backwards ? 2 : 0)) * CHUNK; }
  // Of the last slice there may be fewer than 64, and nothing for the last warps.
  __device__ __forceinline__ int features() const { return min(2 * D - slice, 64); }
  __device__ __forceinline__ bool has_features() const { return 2 * D % 64 == 0 || int(threadIdx.x / 32 * 16) < features(); }

  // A segment's total of feature f.
  __device__ __forceinline__ float* total(int seg, int f) const {
    return scan.totals + ((int64_t(seg) * gridDim.z + bk) * 2 * D + f) * D + threadIdx.x % 4 * 2;
  }
  __device__ __forceinline__ float* z_total(int seg, int f) const {
    const int64_t states = int64_t(gridDim.z) * 2 * D;
    return scan.totals + scan.segments * states * D + (int64_t(seg) * gridDim.z + bk) * 2 * D + f;
  }

  // 64 rows of phi's slice, of which `valid` exist.
  template <class PHI>
  __device__ __forceinline__ void load_features(PHI to, const T* from, int valid) const {
    if constexpr (2 * D % 64 == 0) {
      load_matrix<128, CHUNK>(to, 0, from, 2 * D, valid);
    } else {
      for (int i = threadIdx.x; i < CHUNK * 8; i += 128) {
        const int row = i / 8, col = i % 8 * 8;
        copy_piece(to, row, col, row < valid && col < features() ? from + int64_t(row) * 2 * D + col : nullptr, from);
      }
    }
  }
  // A step's rows of phi and x, and their weights. Does not commit.
  template <bool GATHER, class PHI, class X>
  __device__ __forceinline__ void load(int step, PHI phi, X x, float* weights) const {
    const int head = head_of(step), start = start_of(step);
    const int64_t at = (int64_t(b) * scan.heads + head) * scan.tokens + start;
    load_features(phi, scan.phi + at * 2 * D + slice, scan.tokens - start);
    if constexpr (GATHER) {
      const int32_t* order = scan.routing.order + (int64_t(bk) * scan.slots + slot_of(step)) * CHUNK;
      load_rows<128>(x, 0, CHUNK, scan.x.data, [&](int r) {
        const int t = order[r];
        return enters(scan.routing, t) ? scan.x.row(b, head, row_at_retirement(scan.routing, t, slot_of(step))) : nullptr;
      });
    } else {
      load_matrix<128, CHUNK>(x, 0, scan.x.row(b, head, start), scan.x.token, scan.tokens - start);
    }
    if (scan.weight && threadIdx.x < CHUNK)
      copy_async_word(shared_address(weights + threadIdx.x), scan.weight + at + threadIdx.x, start + threadIdx.x < scan.tokens);
  }

  // What the segments before sum to.
  template <int NT>
  __device__ __forceinline__ void begin_with_totals(float (&sum)[NT][4], float (&z)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* from = total(segment - 1, feature + half * 8);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const float2 t = read_pair(from + n * 8);
        sum[n][half * 2] = t.x;
        sum[n][half * 2 + 1] = t.y;
      }
      z[half * 2] = *z_total(segment - 1, feature + half * 8);
    }
  }
  // The state that the sequence continues, which is the first entry too (ENTRY).
  template <bool ENTRY, int NT>
  __device__ __forceinline__ void begin_with_first(float (&sum)[NT][4], float (&z)[4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t at = int64_t(bk) * 2 * D + feature + half * 8;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const float2 t = read_pair(scan.s_first + at * D + n * 8 + lane % 4 * 2);
        sum[n][half * 2] = t.x;
        sum[n][half * 2 + 1] = t.y;
      }
      z[half * 2] = scan.z_first[at];
      if constexpr (ENTRY) {
        const int64_t entry = int64_t(bk) * scan.entries() * 2 * D + feature + half * 8;
        store_row(true, scan.s + entry * D, sum, half, 1.f);
        if (lane % 4 == 0) scan.z[entry] = z[half * 2];
      }
    }
  }
  // The sums up to a slot: its entry, and the state to decode from if it is the sequence's last.
  template <int NT>
  __device__ __forceinline__ void leave_entry(int slot, const float (&sum)[NT][4], const float (&z)[4]) const {
    const int lane = threadIdx.x % 32;
    const int64_t entry = int64_t(bk) * scan.entries() + slot + (scan.s_first != nullptr);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      store_row(true, scan.s + (entry * 2 * D + feature + half * 8) * D, sum, half, 1.f);
      if (lane % 4 == 0) scan.z[entry * 2 * D + feature + half * 8] = z[half * 2];
      if (scan.s_last && slot == scan.last_slot(b)) {
        const int64_t at = int64_t(bk) * 2 * D + feature + half * 8;
        store_row(true, scan.s_last + at * D, sum, half, 1.f);
        if (lane % 4 == 0) scan.z_last[at] = z[half * 2];
      }
    }
  }
  template <int NT>
  __device__ __forceinline__ void leave_total(const float (&sum)[NT][4], const float (&z)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* to = total(segment, feature + half * 8);
#pragma unroll
      for (int n = 0; n < NT; n++) store_pair(to + n * 8, sum[n][half * 2], sum[n][half * 2 + 1]);
      if (threadIdx.x % 4 == 0) *z_total(segment, feature + half * 8) = z[half * 2];
    }
  }
};

// z += phi' w: the column of S that an x of weights would have. `weights`: of the chunk's rows, in shared memory; null: ones.
template <int P>
__device__ __forceinline__ void add_weighted(float (&z)[4], const Left<P> (&phi)[4], const float* weights) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t w0[2] = {0x3f803f80u, 0u}, w1[2] = {0x3f803f80u, 0u};
    if (weights) {
      const float* w = weights + k * 16 + threadIdx.x % 4 * 2;
      split<2>(w[0], w[1], w0);
      split<2>(w[8], w[9], w1);
#pragma unroll
      for (int p = 0; p < P; p++) mma(z, phi[k].r[p], w0[1], w1[1]);
    }
#pragma unroll
    for (int p = 0; p < P; p++) mma(z, phi[k].r[p], w0[0], w1[0]);
  }
}

}  // namespace still
