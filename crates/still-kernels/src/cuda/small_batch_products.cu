// Products of up to three rows with matrices that lie row by row: every weight is read once, and nothing else matters. Those in
// block formats are in quantized_products.cu.
//
// A warp takes some rows of one matrix and all rows of x; lanes take eight columns at a time. The norm of x needs no pass of
// its own: every warp reads all of x anyway, so that sum(x^2) is at hand when the product is, which it then scales.
#include "early.cuh"
#include "small_batch.cuh"

namespace still {

constexpr int WARPS = 8, COLUMNS = 8;

// Bytes of each of a warp's rows that are brought to the second-level cache while the kernel before ends.
constexpr int PREFETCHED = 4096;

struct Eight {
  float value[COLUMNS];
};

__device__ __forceinline__ Eight spread(uint4 words) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  Eight x;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // bf16 is the upper half of f32
    x.value[2 * i] = __uint_as_float(word[i] << 16);
    x.value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
  return x;
}

__device__ __forceinline__ Eight spread(float4 a, float4 b) { return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}}; }

__device__ __forceinline__ Eight load_eight(const __nv_bfloat16* from) { return spread(*reinterpret_cast<const uint4*>(from)); }

__device__ __forceinline__ Eight load_eight(const float* from) {
  const float4* at = reinterpret_cast<const float4*>(from);
  return spread(at[0], at[1]);
}

// Of what is read once: it need not stay in any cache.
__device__ __forceinline__ Eight stream_eight(const __nv_bfloat16* from) {
  return spread(__ldcs(reinterpret_cast<const uint4*>(from)));
}

__device__ __forceinline__ Eight stream_eight(const float* from) {
  const float4* at = reinterpret_cast<const float4*>(from);
  return spread(__ldcs(at), __ldcs(at + 1));
}

// Rows of one matrix that a warp takes of `R`: where the activation is gated, every other one is of the second matrix.
template <int R>
__host__ __device__ inline int rows_of_each(const StillSmallBatchProducts& all) {
  return all.gated ? R / 2 : R;
}

// Where a warp's `R` rows of weights lie: of one matrix, or of two that take turns. Rows past the last are read, not written.
template <class W, int R>
__device__ __forceinline__ void find_rows(const Products& products, const StillFactor& factor, int first, const W* (&weight)[R]) {
  const StillSmallBatchProducts& a = products.all;
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int row = first + (a.gated ? r / 2 : r), out = factor.out;
    const void* from = a.gated && r % 2 ? products.factor[1].weight : factor.weight;
    weight[r] = static_cast<const W*>(from) + int64_t(row < out ? row : out - 1) * a.inner;
  }
}

template <class X, class W, int N, int R>
__global__ __launch_bounds__(WARPS * 32) void small_batch_products(const __grid_constant__ Products products) {
  let_next_begin();
  const StillSmallBatchProducts& a = products.all;
  const int lane = threadIdx.x % 32, each = rows_of_each<R>(a);
  int group = blockIdx.x * WARPS + threadIdx.x / 32, which = 0;
  const int matrices = a.gated ? 1 : a.count;
  for (; which < matrices; which++) {
    const int groups = (products.factor[which].out + each - 1) / each;
    if (group < groups) break;
    group -= groups;
  }
  if (which == matrices) return wait_for_previous();
  const StillFactor& factor = products.factor[which];
  const int first = group * each, out = factor.out;

  const W* weight[R];
  find_rows(products, factor, first, weight);
  const int bytes = min(PREFETCHED, a.inner * int(sizeof(W)));
#pragma unroll
  for (int r = 0; r < R; r++) prefetch_lines(weight[r], bytes);
  wait_for_previous();
  const X *x = static_cast<const X*>(a.x), *norm = static_cast<const X*>(a.norm);
  float sum[N][R] = {}, square[N] = {};
#pragma unroll 4
  for (int at = lane * COLUMNS; at < a.inner; at += 32 * COLUMNS) {
    Eight w[R];
#pragma unroll
    for (int r = 0; r < R; r++) w[r] = stream_eight(weight[r] + at);
    Eight by;
    if (norm) by = load_eight(norm + at);
#pragma unroll
    for (int n = 0; n < N; n++) {
      Eight values = load_eight(x + int64_t(n) * a.inner + at);
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        if (norm) {
          square[n] += values.value[i] * values.value[i];
          values.value[i] *= by.value[i];
        }
#pragma unroll
        for (int r = 0; r < R; r++) sum[n][r] += values.value[i] * w[r].value[i];
      }
    }
  }

#pragma unroll
  for (int n = 0; n < N; n++) {
    const float scale = norm ? rsqrtf(warp_sum(square[n]) / a.inner + a.eps) : 1.f;
#pragma unroll
    for (int r = 0; r < R; r++) {
      sum[n][r] *= scale;
      if (factor.update && first + r < out) {
        const float *b = factor.update + int64_t(first + r) * factor.rank, *low = factor.low + n * factor.rank;
        for (int i = lane; i < factor.rank; i += 32) sum[n][r] += factor.update_scale * b[i] * low[i];
      }
      sum[n][r] = warp_sum(sum[n][r]);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      if (a.gated && r % 2) continue;
      const int row = first + (a.gated ? r / 2 : r);
      if (lane != r || row >= out) continue;
      float y = sum[n][r];
      if constexpr (R > 1) {
        if (a.gated) y = y / (1.f + __expf(-y)) * sum[n][r + 1 < R ? r + 1 : r];
      }
      const int64_t place = int64_t(n) * out + row;
      if (factor.bias) y += to_f32(static_cast<const X*>(factor.bias)[row]);
      if (factor.add) y += to_f32(static_cast<const X*>(factor.add)[place]);
      if (a.to_dtype == STILL_F32)
        static_cast<float*>(factor.to)[place] = y;
      else
        from_f32(static_cast<X*>(factor.to) + place, y);
    }
  }
}

// Bytes of weights above which a product does not begin early. A large one reads at memory's full speed, and what its early blocks
// fetch is taken from the kernel before it: a step of the 8B shape is 3 % slower then (NOTES-cuda-decode.md).
constexpr int64_t EARLY_BYTES = 16 << 20;

template <class X, class W, int N, int R>
int launch_products(const Products& products, StillStream stream) {
  const int each = rows_of_each<R>(products.all), matrices = products.all.gated ? 1 : products.all.count;
  int groups = 0;
  for (int i = 0; i < matrices; i++) groups += (products.factor[i].out + each - 1) / each;
  int64_t bytes = 0;
  for (int i = 0; i < products.all.count; i++) bytes += int64_t(sizeof(W)) * products.factor[i].out * products.all.inner;
  const auto kernel = small_batch_products<X, W, N, R>;
  const dim3 grid((groups + WARPS - 1) / WARPS);
  if (bytes > EARLY_BYTES) return launch(kernel, grid, WARPS * 32, 0, stream, products);
  return launch_early(kernel, grid, WARPS * 32, 0, stream, products);
}

// Two rows a warp read x half as often, one leaves twice as many warps to wait for memory together.
template <class X, class W, int N>
int by_height(const Products& products, StillStream stream) {
  int64_t height = 0;
  for (int i = 0; i < products.all.count; i++) height += products.factor[i].out;
  const int64_t low = N < STILL_SMALL_BATCH_ROWS ? 4096 : 2048;
  return products.all.gated || height > low ? launch_products<X, W, N, 2>(products, stream) : launch_products<X, W, N, 1>(products, stream);
}

template <class X, class W>
int by_rows(const Products& products, StillStream stream) {
  switch (products.all.rows) {
    case 1: return by_height<X, W, 1>(products, stream);
    case 2: return by_height<X, W, 2>(products, stream);
    case 3: return by_height<X, W, 3>(products, stream);
    default: return cudaErrorInvalidValue;
  }
}

int plain_products(const Products& products, StillStream stream) {
  const StillSmallBatchProducts& a = products.all;
  if (a.dtype == STILL_F32 && a.weight_dtype == STILL_F32) return by_rows<float, float>(products, stream);
  if (a.dtype == STILL_BF16 && a.weight_dtype == STILL_BF16) return by_rows<__nv_bfloat16, __nv_bfloat16>(products, stream);
  if (a.dtype == STILL_BF16 && a.weight_dtype == STILL_F32) return by_rows<__nv_bfloat16, float>(products, stream);
  return cudaErrorInvalidValue;
}

}  // namespace still

using namespace still;

int still_small_batch_products(const StillSmallBatchProducts* args, const StillFactor* factors, StillStream stream) {
  const StillSmallBatchProducts& a = *args;
  if (a.inner <= 0 || a.inner % COLUMNS || a.count <= 0 || a.count > STILL_FACTORS) return cudaErrorInvalidValue;
  if (a.gated && (a.count != 2 || factors[0].out != factors[1].out || factors[0].format != factors[1].format))
    return cudaErrorInvalidValue;
  if (a.to_dtype != STILL_F32 && a.to_dtype != a.dtype) return cudaErrorInvalidValue;
  for (int i = 0; i < a.count; i++)
    if (factors[i].out <= 0 || (a.gated && factors[i].update)) return cudaErrorInvalidValue;
  // One launch for neighbours of one form.
  for (int first = 0, next = 0; first < a.count; first = next) {
    const int32_t format = factors[first].format;
    Products products = {a, {}};
    for (next = first; next < a.count && factors[next].format == format; next++) products.factor[next - first] = factors[next];
    products.all.count = next - first;
    const int error = format == STILL_PLAIN ? plain_products(products, stream) : quantized_products(products, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
