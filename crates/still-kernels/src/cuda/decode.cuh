// The state of a layer while it decodes.
#pragma once
#include <type_traits>
#include "codes.cuh"
#include "early.cuh"
#include "rotate_step.cuh"
#include "scores.cuh"

namespace still {

constexpr int RING = 2 * CHUNK;

// Whether a chunk retires before the token at `position` is answered: the one two before its own.
__device__ __forceinline__ bool retires(int position) { return position >= RING && position % CHUNK == 0; }

template <class T>
struct Decode {
  Rows<const T> q, k, v, gate;
  Rows<T> out;
  const T *w_q, *w_k;
  const float* log_scale;
  const int32_t *budgets, *positions;
  int cap;
  T *ring_k, *ring_v;
  const StillStore* there;
  int coding, batch;
  const float* key_scale;
  float *ring_score, *s, *z, *partial;
  uint64_t* admitted;
  uint32_t* arrived;
  int splits, heads, kv_heads, group, flags;
  StillRouter router;
  const float *cos, *sin;  // null: q and k are rotated
  int half;                // rotated pairs of channels
  const StillSequenceState* states;

  Decode(const StillShape& shape, const StillDecode& a)
      : q(a.q), k(a.k), v(a.v), gate(a.gate), out(a.out), w_q(static_cast<const T*>(a.w_q)), w_k(static_cast<const T*>(a.w_k)),
        log_scale(a.log_scale), budgets(a.budgets), positions(a.positions), cap(a.cap), ring_k(static_cast<T*>(a.ring_k)),
        ring_v(static_cast<T*>(a.ring_v)), there(a.store), coding(a.coding), batch(shape.batch), key_scale(a.key_scale), ring_score(a.ring_score), s(a.s), z(a.z),
        partial(a.partial), admitted(a.admitted), arrived(a.arrived), splits(a.splits), heads(shape.heads), kv_heads(shape.kv_heads),
        group(shape.heads / shape.kv_heads), flags(shape.flags), router(a.router), cos(a.cos), sin(a.sin),
        half(a.rotary / 2), states(a.states) {}

  // What the kernels of sequence `b` read, whose rows have `d` channels. EACH: sequences have a state each.
  template <bool EACH>
  __device__ __forceinline__ std::conditional_t<EACH, Decode, const Decode&> own(int b, int d) const {
    if constexpr (!EACH) {
      return *this;
    } else {
      Decode in = *this;
      const StillSequenceState* const own = states + b;
      // A state is a batch of one: what is found by (sequence, head) is found from where its sequence would begin.
      const int64_t heads = int64_t(b) * kv_heads;
      in.w_q = static_cast<const T*>(own->w_q);
      in.w_k = static_cast<const T*>(own->w_k);
      in.log_scale = own->log_scale;
      in.budgets = own->budgets;
      in.ring_k = static_cast<T*>(own->ring_k) - heads * RING * d;
      in.ring_v = static_cast<T*>(own->ring_v) - heads * RING * d;
      in.ring_score = own->ring_score - heads * RING;
      in.s = own->s - heads * 2 * d * d;
      in.z = own->z - heads * 2 * d;
      in.there = own->store;
      in.batch = 1;
      return in;
    }
  }

  // Of a sequence.
  __device__ __forceinline__ StepRope rope(int b) const { return {cos ? cos + b * half : nullptr, cos ? sin + b * half : nullptr, half}; }

  // What the ring's token at `place` of a retiring chunk is ranked by.
  __device__ __forceinline__ float retiring_score(float in_ring, int place) const {
    return router.kind == STILL_RECEIVED_ATTENTION ? received_mean(in_ring, place, RING, group) : in_ring;
  }
};

// A state and where its store lies now, which a kernel looks up first.
template <class T>
struct Stored : Decode<T> {
  T *store_k, *store_v;
  float* store_score;
  int32_t* store_token;
  const int64_t* store_offset;
  int64_t store_entries;  // from one sequence's to the next one's
  int64_t all_entries;

  // `alone`: the store has this sequence only, whichever it is of the step.
  __device__ __forceinline__ explicit Stored(const Decode<T>& state, bool alone = false) : Decode<T>(state) {
    const StillStore& at = *state.there;
    store_k = static_cast<T*>(at.k);
    store_v = static_cast<T*>(at.v);
    store_score = at.score;
    store_token = at.token;
    store_offset = at.offset;
    store_entries = alone ? 0 : at.entries;
    all_entries = this->batch * at.entries;
  }

  // First entry of a head's store, in rows of D.
  __device__ __forceinline__ int64_t store(int b, int kv) const { return b * store_entries + store_offset[kv]; }
  // The rows of the stores, where they are codes.
  __device__ __forceinline__ CodedRows keys(int d, int kv) const {
    CodedRows rows(store_k, all_entries, this->coding, d, true);
    if (this->key_scale) rows.key_scale = this->key_scale + kv * d;
    return rows;
  }
  __device__ __forceinline__ CodedRows values(int d) const { return CodedRows(store_v, all_entries, this->coding, d, false); }
};

}  // namespace still
