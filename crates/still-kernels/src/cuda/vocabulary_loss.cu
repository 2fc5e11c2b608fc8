// Losses over the vocabulary and the gradient of the logits: a block a row, which is read twice and written once.
#include "decoder.h"
#include "launch.cuh"
#include "values.cuh"

namespace still {

constexpr int LOSS_THREADS = 512;

// The largest of some logits, and the sum of their exponentials less it.
struct Softmax {
  float maximum = -INFINITY, sum = 0.f;

  // Four at a time: a maximum that moves costs one more exponential for all of them.
  __device__ __forceinline__ void add(const float (&x)[4]) {
    const float top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    if (top > maximum) {
      sum *= __expf(maximum - top);
      maximum = top;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sum += __expf(x[i] - maximum);
  }

  __device__ __forceinline__ void merge(float other_maximum, float other_sum) {
    const float top = fmaxf(maximum, other_maximum);
    if (top == -INFINITY) return;
    sum = sum * __expf(maximum - top) + other_sum * __expf(other_maximum - top);
    maximum = top;
  }
};

// Of a row by the whole block, for every thread; `place` is shared memory of 64 floats.
__device__ __forceinline__ Softmax row_softmax(const float* logits, int vocab, float* place) {
  Softmax own;
  for (int i = threadIdx.x; i < vocab; i += 4 * LOSS_THREADS) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = i + j * LOSS_THREADS < vocab ? logits[i + j * LOSS_THREADS] : -INFINITY;
    own.add(x);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step > 0; step /= 2)
    own.merge(__shfl_xor_sync(~0u, own.maximum, step), __shfl_xor_sync(~0u, own.sum, step));
  __syncthreads();
  if (lane == 0) place[warp] = own.maximum, place[32 + warp] = own.sum;
  __syncthreads();
  const bool there = lane < LOSS_THREADS / 32;
  own.maximum = there ? place[lane] : -INFINITY;
  own.sum = there ? place[32 + lane] : 0.f;
  for (int step = 16; step > 0; step /= 2)
    own.merge(__shfl_xor_sync(~0u, own.maximum, step), __shfl_xor_sync(~0u, own.sum, step));
  return own;
}

template <class T>
__global__ void __launch_bounds__(LOSS_THREADS) vocabulary_loss(StillVocabularyLoss args) {
  __shared__ float place[64];
  const int64_t row = blockIdx.x;
  const int vocab = args.vocab;
  const float* student = args.student + row * vocab;
  const float* teacher = args.teacher ? args.teacher + row * vocab : nullptr;
  T* d = static_cast<T*>(args.d_logits) + row * vocab;

  const Softmax of_student = row_softmax(student, vocab, place);
  const float next = args.ids ? args.there[row] : 0.f;
  const int id = args.ids ? int(args.ids[row]) : -1;
  const float own = (args.kl_weight * (teacher ? 1.f : 0.f) + args.next_weight * next) / of_student.sum;
  const float id_weight = args.next_weight * next;
  float divergence = 0.f;
  if (teacher) {
    const Softmax of_teacher = row_softmax(teacher, vocab, place);
    const float theirs = args.kl_weight / of_teacher.sum;
    float sums[1] = {0.f};
    for (int i = threadIdx.x; i < vocab; i += LOSS_THREADS) {
      const float s = student[i] - of_student.maximum, t = teacher[i] - of_teacher.maximum;
      const float power = __expf(t);
      sums[0] += power * (t - s);
      from_f32(d + i, own * __expf(s) - theirs * power - (i == id ? id_weight : 0.f));
    }
    block_sums(sums, place);
    divergence = sums[0] / of_teacher.sum + logf(of_student.sum) - logf(of_teacher.sum);
  } else {
    for (int i = threadIdx.x; i < vocab; i += LOSS_THREADS)
      from_f32(d + i, own * __expf(student[i] - of_student.maximum) - (i == id ? id_weight : 0.f));
  }
  if (threadIdx.x == 0) {
    float loss = args.kl_share * divergence;
    if (next != 0.f) loss += args.next_share * next * (of_student.maximum - student[id] + logf(of_student.sum));
    args.losses[row] = loss;
  }
}

}  // namespace still

using namespace still;

int still_vocabulary_loss(const StillVocabularyLoss* args, StillStream stream) {
  if (args->vocab <= 0 || (args->ids && !args->there)) return cudaErrorInvalidValue;
  return by_dtype(args->dtype, [&](auto t) {
    using T = decltype(t);
    return launch(vocabulary_loss<T>, dim3(unsigned(args->rows)), LOSS_THREADS, 0, stream, *args);
  });
}
