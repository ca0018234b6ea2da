// Test only: asks a GPU whether the roots and quotients of csrc/cuda/numbers.cuh are rounded as IEEE 754 has
// it: the roots of all floats, and some 10^11 quotients. Prints how many are not.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>

#include "cuda/numbers.cuh"
#include "formats/split_masters.h"

namespace adamops {
namespace {

using Wrong = unsigned long long;

__device__ void compare(float ours, float expected, Wrong* wrong) {
  if (__float_as_uint(ours) != __float_as_uint(expected) && !(ours != ours && expected != expected))
    atomicAdd(wrong, Wrong{1});
}

__global__ void roots(Wrong* wrong) {
  OwnFloats a;
  for (int i = 0; i < kElementsPerThread; ++i)
    a[i] = __uint_as_float((blockIdx.x * blockDim.x + threadIdx.x) * kElementsPerThread + i);
  const OwnFloats root = CudaOwnOps::sqrt(a);
  for (int i = 0; i < kElementsPerThread; ++i) compare(root[i], __fsqrt_rn(a[i]), wrong);
}

enum Draw { kAnyBits, kFastRange, kSignificands, kDivisorsNearTwo };

template <Draw kDraw>
__global__ void quotients(uint32_t key, Wrong* wrong) {
  constexpr uint32_t kOne = 0x3F800000, kFraction = 0x7FFFFF;
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < 64; ++round) {
    OwnFloats a, b;
    for (int i = 0; i < kElementsPerThread; ++i) {
      const uint32_t x = mixed_bits(thread ^ mixed_bits(key + static_cast<uint32_t>(round * kElementsPerThread + i))),
                     y = mixed_bits(~x);
      if (kDraw == kAnyBits) {
        a[i] = __uint_as_float(x), b[i] = __uint_as_float(y);
      } else if (kDraw == kFastRange) {
        a[i] = __uint_as_float(0x1F800000u + x % 0x3F000001u), b[i] = __uint_as_float(0x20800000u + y % 0x3E000001u);
      } else {
        a[i] = __uint_as_float(kOne | (x & kFraction));
        b[i] = __uint_as_float(kDraw == kSignificands ? kOne | ((thread * kElementsPerThread + i) & kFraction)
                                                      : (kOne | kFraction) - (y & 15));
      }
    }
    const OwnFloats quotient = CudaOwnOps::div(a, b);
    for (int i = 0; i < kElementsPerThread; ++i) compare(quotient[i], __fdiv_rn(a[i], b[i]), wrong);
  }
}

}  // namespace
}  // namespace adamops

int main() {
  using namespace adamops;
  Wrong *there, here = 0;
  if (cudaMalloc(&there, sizeof here) != cudaSuccess || cudaMemset(there, 0, sizeof here) != cudaSuccess) return 2;
  constexpr unsigned kThreads = 256, kBlocks = 1u << 18;
  roots<<<(1u << 29) / kThreads, kThreads>>>(there);
  for (uint32_t key = 0; key < 2; ++key) {
    quotients<kAnyBits><<<kBlocks, kThreads>>>(1000 * key, there);
    quotients<kFastRange><<<kBlocks, kThreads>>>(1000 * key + 1, there);
    quotients<kSignificands><<<kBlocks, kThreads>>>(1000 * key + 2, there);
    quotients<kDivisorsNearTwo><<<kBlocks, kThreads>>>(1000 * key + 3, there);
  }
  if (cudaMemcpy(&here, there, sizeof here, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
  std::printf("%llu\n", here);
  return here != 0;
}
