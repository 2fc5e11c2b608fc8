// The feature map of linear attention alone, after its product f = x W: phi = [softmax(u); softmax(-u)], u = f, or of the NP-Map
// u = |x| f / |f|. A warp has a row, which the first-level cache holds from one look to the next.
#include "launch.cuh"

namespace still {

constexpr int FEATURE_ROWS = 8;  // of a block

struct Features {
  int64_t rows;
  int32_t width, d;
  const float *f, *x;  // [rows, width]; of the NP-Map [rows, d], else null
};

__device__ __forceinline__ float warp_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
  return x;
}
__device__ __forceinline__ int64_t feature_row() { return int64_t(blockIdx.x) * FEATURE_ROWS + threadIdx.x / 32; }

// The length of a row.
__device__ __forceinline__ float row_length(const float* row, int width) {
  float squares = 0.f;
  for (int i = threadIdx.x % 32; i < width; i += 32) squares += row[i] * row[i];
  return sqrtf(warp_sum(squares));
}

__global__ void __launch_bounds__(FEATURE_ROWS * 32) features(const Features in, float* phi) {
  const int64_t row = feature_row();
  if (row >= in.rows) return;
  const int lane = threadIdx.x % 32, width = in.width;
  const float* const f = in.f + row * width;
  const float scale = in.x ? row_length(in.x + row * in.d, in.d) / fmaxf(row_length(f, width), 1e-12f) : 1.f;
  float up = -INFINITY, down = -INFINITY;
  for (int i = lane; i < width; i += 32) {
    up = fmaxf(up, f[i] * scale);
    down = fmaxf(down, -f[i] * scale);
  }
  up = warp_max(up);
  down = warp_max(down);
  float of_up = 0.f, of_down = 0.f;
  for (int i = lane; i < width; i += 32) {
    of_up += expf(f[i] * scale - up);
    of_down += expf(-f[i] * scale - down);
  }
  of_up = 1.f / warp_sum(of_up);
  of_down = 1.f / warp_sum(of_down);
  float* const to = phi + row * 2 * width;
  for (int i = lane; i < width; i += 32) {
    to[i] = expf(f[i] * scale - up) * of_up;
    to[width + i] = expf(-f[i] * scale - down) * of_down;
  }
}

__global__ void __launch_bounds__(FEATURE_ROWS * 32)
    features_backward(const Features in, const float* all_phi, const float* d_all_phi, float* d_f, float* d_x) {
  const int64_t row = feature_row();
  if (row >= in.rows) return;
  const int lane = threadIdx.x % 32, width = in.width;
  const float *const phi = all_phi + row * 2 * width, *const d_phi = d_all_phi + row * 2 * width;
  float* const to = d_f + row * width;
  float up = 0.f, down = 0.f;
  for (int i = lane; i < width; i += 32) {
    up += phi[i] * d_phi[i];
    down += phi[width + i] * d_phi[width + i];
  }
  up = warp_sum(up);
  down = warp_sum(down);
  auto d_u = [&](int i) { return phi[i] * (d_phi[i] - up) - phi[width + i] * (d_phi[width + i] - down); };
  if (!in.x) {
    for (int i = lane; i < width; i += 32) to[i] = d_u(i);
    return;
  }
  const float *const f = in.f + row * width, *const x = in.x + row * in.d;
  const float of_x = row_length(x, in.d), of_f = fmaxf(row_length(f, width), 1e-12f);
  float along = 0.f;
  for (int i = lane; i < width; i += 32) along += f[i] * d_u(i);
  along = warp_sum(along);
  const float scale = of_x / of_f, back = along / (of_f * of_f);
  for (int i = lane; i < width; i += 32) to[i] = scale * (d_u(i) - f[i] * back);
  if (d_x)
    for (int i = lane; i < in.d; i += 32) d_x[row * in.d + i] = x[i] * (along / (of_f * fmaxf(of_x, 1e-30f)));
}

}  // namespace still

using namespace still;

extern "C" int still_features(int64_t rows, int32_t width, int32_t d, const float* f, const float* x, float* phi, StillStream stream) {
  return launch(features, dim3((rows + FEATURE_ROWS - 1) / FEATURE_ROWS), FEATURE_ROWS * 32, 0, stream, Features{rows, width, d, f, x}, phi);
}

extern "C" int still_features_backward(int64_t rows, int32_t width, int32_t d, const float* f, const float* x, const float* phi,
                                       const float* d_phi, float* d_f, float* d_x, StillStream stream) {
  return launch(features_backward, dim3((rows + FEATURE_ROWS - 1) / FEATURE_ROWS), FEATURE_ROWS * 32, 0, stream,
                Features{rows, width, d, f, x}, phi, d_phi, d_f, d_x);
}
