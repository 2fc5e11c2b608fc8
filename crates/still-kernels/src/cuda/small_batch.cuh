// What products of a small batch have in common, however their matrices are stored.
#pragma once
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

struct Products {
  StillSmallBatchProducts all;
  StillFactor factor[STILL_FACTORS];
};

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// As still_small_batch_products, of matrices that are all of one block format.
int quantized_products(const Products& products, StillStream stream);

}  // namespace still
