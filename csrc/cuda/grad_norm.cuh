// The CUDA kernels of the norm of grads: the sums of cpu/grad_norm.cpp and python/cpu_module.cpp in the same order, so
// that the norm is bit-identical to that of the CPU. A warp takes a chunk of a grad; each thread does what the CPU does
// in one lane.
#pragma once

#include "cuda/direct.cuh"
#include "grad_norm.h"

namespace adamops {

constexpr int kLanes = 32;  // of a warp
static_assert(kLanes == kNormLanes, "a thread of a warp does what the CPU has in one lane");
constexpr int kChunksPerBlock = kThreads / kLanes;
constexpr int kGradsPerLaunch = (kParameterBytes - 64) / (sizeof(void*) + sizeof(int64_t) + 2 * sizeof(uint32_t));

struct NormLaunch {
  double* partial;  // of each chunk of all grads, in order
  Dtype dtype;
  Norm norm;
  uint32_t count;
  uint32_t first_block[kGradsPerLaunch + 1];
  uint32_t first_chunk[kGradsPerLaunch];  // where the partial results of a grad begin
  const void* grads[kGradsPerLaunch];
  int64_t numels[kGradsPerLaunch];
};
static_assert(sizeof(NormLaunch) <= kParameterBytes, "the parameters of a launch are too large");

// What a lane accumulates: the sum of magnitudes or of their squares, or the largest magnitude by its bits, so that NaN
// is the largest of all.
template <Norm kNorm>
struct LaneNorm {
  double sum = 0.0;
  uint32_t largest = 0;

  __device__ void add(float x) {
    const uint32_t magnitude = __float_as_uint(x) & 0x7FFFFFFFu;
    if constexpr (kNorm == kNormInf) {
      largest = magnitude > largest ? magnitude : largest;
    } else {
      const double wide = static_cast<double>(__uint_as_float(magnitude));
      sum = __dadd_rn(sum, kNorm == kNorm2 ? __dmul_rn(wide, wide) : wide);
    }
  }
  __device__ double result() const { return kNorm == kNormInf ? static_cast<double>(__uint_as_float(largest)) : sum; }
};

// The result of one lane of a chunk. A full chunk is loaded kAtOnce elements at a time, enough to keep the memory busy.
template <Norm kNorm, class T>
__device__ inline double norm_of_lane(const T* grad, int64_t count) {
  LaneNorm<kNorm> lane_norm;
  const int64_t lane = threadIdx.x % kLanes;
  if (count < kNormChunk) {
    for (int64_t i = lane; i < count; i += kLanes) lane_norm.add(widen(T{}, load_bits(grad + i)));
    return lane_norm.result();
  }
  constexpr int kAtOnce = 16;
  static_assert(kAtOnce % kNormStreams == 0, "from one time to the next all places move on by as much");
  for (int64_t begin = 0; begin < kNormChunk; begin += kAtOnce * kLanes) {
    const T* const from = grad + norm_index(begin) + lane;
    float x[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = widen(T{}, load_bits(from + norm_index(i * kLanes)));
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) lane_norm.add(x[i]);
  }
  return lane_norm.result();
}
template <class T>
__device__ inline double norm_of_lane(const void* grad, int64_t begin, int64_t count, Norm norm) {
  const T* const from = static_cast<const T*>(grad) + begin;
  if (norm == kNorm2) return norm_of_lane<kNorm2>(from, count);
  return norm == kNorm1 ? norm_of_lane<kNorm1>(from, count) : norm_of_lane<kNormInf>(from, count);
}

// Combines the lanes in order; all threads of the warp must call this.
__device__ inline double joined_lanes(Norm norm, double so_far, double own) {
  const auto of_lane = [own](int lane) { return __shfl_sync(0xFFFFFFFFu, own, lane); };
  if (norm != kNormInf) {
    for (int lane = 0; lane < kLanes; ++lane) so_far = __dadd_rn(so_far, of_lane(lane));
    return so_far;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const double next = of_lane(lane);
    so_far = next > so_far || next != next ? next : so_far;
  }
  return so_far;
}

static __global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ NormLaunch launch) {
  const uint32_t index = tensor_of_block(launch.first_block, launch.count, blockIdx.x);
  const uint32_t chunk = (blockIdx.x - launch.first_block[index]) * kChunksPerBlock + threadIdx.x / kLanes;
  const int64_t begin = chunk * kNormChunk;
  if (begin >= launch.numels[index]) return;  // the whole warp returns
  const int64_t left = launch.numels[index] - begin, count = left < kNormChunk ? left : kNormChunk;
  const void* const grad = launch.grads[index];
  double own;
  if (launch.dtype == kFloat32)
    own = norm_of_lane<float>(grad, begin, count, launch.norm);
  else if (launch.dtype == kBfloat16)
    own = norm_of_lane<bf16>(grad, begin, count, launch.norm);
  else
    own = norm_of_lane<fp16>(grad, begin, count, launch.norm);
  const double of_chunk = joined_lanes(launch.norm, 0.0, own);
  if (threadIdx.x % kLanes == 0) launch.partial[launch.first_chunk[index] + chunk] = of_chunk;
}

struct TotalLaunch {
  const double* partial;
  int64_t count;
  Norm norm;
  double* total;
};

// Combines the results of the chunks, in order, into the norm: one warp.
static __global__ void __launch_bounds__(kLanes) total_kernel(const __grid_constant__ TotalLaunch launch) {
  double total = 0.0;
  for (int64_t i = 0; i < launch.count; i += kLanes) {
    const int64_t own = i + threadIdx.x;
    total = joined_lanes(launch.norm, total, own < launch.count ? launch.partial[own] : 0.0);
  }
  if (threadIdx.x == 0) *launch.total = launch.norm == kNorm2 ? __dsqrt_rn(total) : total;
}

}  // namespace adamops
