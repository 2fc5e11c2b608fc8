// One cuBLAS product a line of output, none of this project's code:
//
//   nvcc -arch=sm_90 cublas_under_racecheck.cu -lcublas
//   compute-sanitizer --tool racecheck --kernel-name kns=none_of_this_name ./a.out
#include <cublas_v2.h>
#include <cstdio>

int main() {
  const int n = 1096, k = 184;
  cublasHandle_t handle;
  float *x, *y, *z, one = 1, zero = 0;
  if (cublasCreate(&handle) || cudaMalloc(&x, 8 * k * 4) || cudaMalloc(&y, n * k * 4) || cudaMalloc(&z, 8 * n * 4)) return 2;
  cudaMemset(x, 0, 8 * k * 4);
  cudaMemset(y, 0, n * k * 4);
  for (cudaDataType_t type : {CUDA_R_32F, CUDA_R_16BF})
    for (int m = 1; m <= 8; m++) {
      const int status = cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one, y, type, k, x, type, k, &zero, z, type, n,
                                      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT_TENSOR_OP);
      const cudaError_t error = cudaDeviceSynchronize();
      printf("%s, %d rows: status %d, %s\n", type == CUDA_R_32F ? "f32" : "bf16", m, status, cudaGetErrorName(error));
      if (error) return 1;
    }
}
