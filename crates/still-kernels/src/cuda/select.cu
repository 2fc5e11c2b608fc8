// The tokens of each whole chunk that are kept: those with the highest scores, ties to the earlier.
#include "ranked.cuh"

namespace still {

__global__ void __launch_bounds__(CHUNK) select(const float* score, const int32_t* budgets, uint64_t* selected, int32_t* salient,
                                                uint32_t* absorbed_at, int tokens) {
  __shared__ float scores[CHUNK];
  __shared__ uint32_t words[2];
  const int chunk = blockIdx.x, head = blockIdx.y, t = threadIdx.x;
  const int64_t row = int64_t(blockIdx.z) * gridDim.y + head;
  const int budget = budgets[head];
  const bool whole = (chunk + 1) * CHUNK <= tokens;
  float mine = whole ? sound(score[row * tokens + chunk * CHUNK + t]) : 0.f;
  scores[t] = mine;
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < CHUNK; j++) rank += scores[j] > mine || (scores[j] == mine && j < t);
  uint32_t word = __ballot_sync(0xffffffffu, whole && rank < budget);
  if (t % 32 == 0) words[t / 32] = word;
  __syncthreads();
  uint64_t mask = uint64_t(words[1]) << 32 | words[0];
  if (t == 0) selected[row * gridDim.x + chunk] = mask;
  if (absorbed_at && chunk * CHUNK + t < tokens)
    absorbed_at[row * tokens + chunk * CHUNK + t] = mask >> t & 1 || chunk + 2 >= gridDim.x ? UINT32_MAX : chunk + 2;
  if (mask >> t & 1) {
    int place = __popcll(mask & ((uint64_t(1) << t) - 1));
    salient[row * tokens + int64_t(chunk) * budget + place] = chunk * CHUNK + t;
  }
}

}  // namespace still

extern "C" int still_select(const StillShape* shape, const float* score, const int32_t* budgets, uint64_t* selected,
                            int32_t* salient, uint32_t* absorbed_at, StillStream stream) {
  if (!still::valid(*shape)) return cudaErrorInvalidValue;
  return still::launch(still::select, dim3(still::chunks(*shape), shape->kv_heads, shape->batch), still::CHUNK, 0, stream, score,
                       budgets, selected, salient, absorbed_at, shape->tokens);
}
