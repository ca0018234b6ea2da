// Test only: stands in for CUDA's header, so that csrc/adam/fused_adam.cu and its kernels compile as C++ and run on the
// host. A launch calls the kernel for every thread of every block, one after another; the kernels have no barriers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 blockIdx, threadIdx;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Compiled with -ffp-contract=off, so that each operation rounds once.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fsqrt_rn(float a) {
  return std::sqrt(a);
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline double __dsub_rn(double a, double b) {
  return a - b;
}
inline double __ddiv_rn(double a, double b) {
  return a / b;
}
inline double __dsqrt_rn(double a) {
  return std::sqrt(a);
}
inline float __double2float_rn(double a) {
  return static_cast<float>(a);
}

inline uint32_t __float_as_uint(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

// The runtime of a machine that has two devices. EMULATED_CUDA_ERROR=1 makes every launch fail, and
// EMULATED_CUDA_NO_CODE=1 says that the kernels were not compiled for the devices. EMULATED_CUDA_DRIVER is the driver's
// version, 13000 if unset.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35 };
constexpr int kEmulatedDevices = 2;
inline int emulated_device = 0;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error ? "emulated failure" : "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  const char* const set = std::getenv("EMULATED_CUDA_DRIVER");
  return *version = set ? std::atoi(set) : 13000, cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return *count = kEmulatedDevices, driver < 13000 ? cudaErrorInsufficientDriver : cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = emulated_device, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kEmulatedDevices) return cudaErrorInvalidValue;
  emulated_device = device;
  return cudaSuccess;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return std::getenv("EMULATED_CUDA_NO_CODE") ? cudaErrorInvalidValue : cudaSuccess;
}

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  if (std::getenv("EMULATED_CUDA_ERROR")) return cudaErrorInvalidValue;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(*static_cast<Parameters*>(arguments[0]));
  return cudaSuccess;
}
