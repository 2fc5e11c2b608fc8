// What the stages of `decode_attend` share: a block's place in the work, its shared memory, and where it leaves its result.
#pragma once
#include "decode.cuh"
#include "decode_group.cuh"

namespace still {

constexpr int MOST_PARTS = 65;  // of a store, and the ring

// Which part of a (sequence, KV head) a block has, and how much there is to attend to. The parts below `ring_part` share the
// store, two for each query head follow it.
struct Place {
  int b, kv, part, ring_part;
  int position, chunk;  // of the token
  int kept, absorbed;   // tokens in the store, in the linear state
  int tiles, share;     // tiles of 64 tokens in the store, in one part of it
  int64_t bk;

  template <class T>
  __device__ __forceinline__ Place(const Decode<T>& in, int position)
      : b(blockIdx.z), kv(blockIdx.y), part(blockIdx.x), ring_part(in.splits), position(position), chunk(position / CHUNK),
        bk(int64_t(b) * in.kv_heads + kv) {
    const int retired = max(chunk - 1, 0);
    kept = kept_tokens(in.cap, in.budgets[kv], retired);
    absorbed = retired * CHUNK - kept;
    tiles = in.flags & STILL_NO_SALIENT ? 0 : (kept + CHUNK - 1) / CHUNK;
    share = (tiles + ring_part - 1) / ring_part;
  }

  // Whether there is nothing for the part to do.
  __device__ __forceinline__ bool idle() const { return part < ring_part && part * share >= tiles; }

  // Where a part leaves its numerators [GROUP, D] and, behind them, maxima and sums [2, GROUP].
  template <int D, class T>
  __device__ __forceinline__ float* partial(const Decode<T>& in, int part) const {
    return in.partial + (bk * gridDim.x + part) * GROUP * (D + 2);
  }
};

// Dynamic shared memory: two stages of keys and values, the group's queries, and its logits over the ring.
template <class K>
struct DecodeMemory {
  using Stage = Tile<K::P, 128, K::D>;   // 64 keys, 64 values
  using Queries = Tile<K::P, 16, K::D>;  // the group's queries are the rows of one left operand
  static constexpr int WINDOW = 2 * Stage::BYTES + Queries::BYTES;

  float* floats;  // in place of the stages, where there are none
  uint32_t base;

  __device__ __forceinline__ explicit DecodeMemory(unsigned char* memory)
      : floats(reinterpret_cast<float*>(memory)), base(shared_address(memory)) {}
  __device__ __forceinline__ Stage stage(int i) const { return Stage{base + i % 2 * Stage::BYTES}; }
  __device__ __forceinline__ Queries queries() const { return Queries{base + 2 * Stage::BYTES}; }
  // [group, RING] logits.
  __device__ __forceinline__ float* window() const { return floats + WINDOW / 4; }
  // Of a linear part: the state's half lies in the stages if it fits, and what lanes add up behind it.
  static constexpr bool HAS_STATE = K::D <= 128;
  static constexpr int STATE = HAS_STATE ? K::D * K::D : 0, LANE_SUMS = 1024;
  static_assert(WINDOW / 4 >= STATE + LANE_SUMS);
  __device__ __forceinline__ float* lane_sums() const { return floats + STATE; }
  // When parts are merged, two of [GROUP, MOST_PARTS] weights lie in the stages.
  static_assert(2 * Stage::BYTES >= 2 * GROUP * MOST_PARTS * 4);
  static int bytes(int group) { return WINDOW + group * RING * 4; }
};

// Static shared memory.
template <int D>
struct DecodeScratch {
  float four[4], others[4];  // of the four warps
  float x[D], phi[D];        // the linear branch: a query, phi(x)
  WarpStats<true> warps;
};

}  // namespace still
