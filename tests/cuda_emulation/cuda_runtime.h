// Test only: stands in for CUDA's header, so that csrc/cuda/launches.cu and its kernels compile as C++ and run on the
// host. The 32 threads of a warp take turns, each running until it exchanges data with the others. The warps run one
// after another. There are no thread block barriers.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "runtime/float_environment.h"

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

struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

// Compiled with -ffp-contract=off, so that each operation rounds once.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fadd_rd(float a, float b) {  // right if a double holds the sum exactly
  const double sum = static_cast<double>(a) + static_cast<double>(b);
  const float nearest = static_cast<float>(sum);
  return static_cast<double>(nearest) > sum ? std::nextafter(nearest, -INFINITY) : nearest;
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
inline double __dadd_rn(double a, double b) {
  return a + b;
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

// Of the eight bytes of two words, selects the four that the hex digits of `selector` name, lowest first.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i) & 0xFu;
    if (which > 7) std::abort();  // sign replication, which the kernels do not use
    result |= (static_cast<uint32_t>(bytes >> (8 * which)) & 0xFFu) << (8 * i);
  }
  return result;
}

// The runtime of a machine with two devices. EMULATED_CUDA_ERROR=1 makes every launch fail. EMULATED_CUDA_NO_CODE=1
// reports that the kernels were not compiled for the devices. EMULATED_CUDA_DRIVER is the driver's version, 13000 if
// unset.
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

// Runs a launch as 32 contexts, one per lane, that take turns. Each goes through all thread blocks and warps, and
// yields whenever it exchanges data with the other lanes of its warp.
class EmulatedWarps {
 public:
  template <class Parameters>
  EmulatedWarps(void (*kernel)(Parameters), const Parameters& parameters, dim3 grid, dim3 block) {
    struct Launch {
      void (*kernel)(Parameters);
      const Parameters& parameters;
    };
    const Launch launch{kernel, parameters};
    launch_ = &launch;
    grid_ = grid.x, block_ = block.x;
    call_ = [](const void* launched) {
      const Launch& own = *static_cast<const Launch*>(launched);
      own.kernel(own.parameters);
    };
    EmulatedWarps*& current = EmulatedWarps::current();
    current = this;
    for (Lane& lane : lanes_) lane.make();
    swapcontext(&caller_, &lanes_[0].context);
    current = nullptr;
  }

  // The value that another lane of the warp passes. All lanes must call this.
  template <class T>
  T exchange(T own, unsigned other) {
    static_assert(sizeof(T) <= sizeof(double));
    Lane& lane = lanes_[lane_];
    std::memcpy(&lane.said[lane.turns % 2], &own, sizeof own);
    give_way();
    std::memcpy(&own, &lanes_[other].said[(lane.turns - 1) % 2], sizeof own);
    return own;
  }
  unsigned lane() const { return lane_; }

  static EmulatedWarps*& current() {
    static thread_local EmulatedWarps* warps = nullptr;
    return warps;
  }

 private:
  static constexpr size_t kStack = 256 * 1024;  // it holds the kernel's parameters, 32 kB
  struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    double said[2] = {};  // in even and in odd turns: a lane may be one turn ahead of others
    uint64_t turns = 0;
    dim3 block_index, thread_index;
    bool done = false;

    void make() {
      getcontext(&context);
      context.uc_stack.ss_sp = stack.get();
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, &EmulatedWarps::run_lane, 0);
    }
  };

  // Switches to the next lane, and from the last to the first.
  void give_way() {
    Lane& own = lanes_[lane_];
    ++own.turns;
    own.block_index = blockIdx, own.thread_index = threadIdx;
    lane_ = (lane_ + 1) % 32;
    if (lanes_[lane_].done) {
      std::fputs("emulated CUDA: threads of a warp have gone different ways\n", stderr);
      std::abort();
    }
    Lane& next = lanes_[lane_];
    blockIdx = next.block_index, threadIdx = next.thread_index;
    swapcontext(&own.context, &next.context);
  }

  static void run_lane() {
    EmulatedWarps& own = *current();
    const unsigned lane = own.lane_;
    for (unsigned block = 0; block < own.grid_; ++block) {
      for (unsigned thread = lane; thread < own.block_; thread += 32) {
        blockIdx = dim3(block), threadIdx = dim3(thread);
        own.call_(own.launch_);
      }
    }
    own.lanes_[lane].done = true;
    if (lane == 31) setcontext(&own.caller_);
    own.lane_ = lane + 1;
    blockIdx = own.lanes_[lane + 1].block_index, threadIdx = own.lanes_[lane + 1].thread_index;
    setcontext(&own.lanes_[lane + 1].context);
  }

  const void* launch_;
  void (*call_)(const void*);
  unsigned grid_, block_, lane_ = 0;
  ucontext_t caller_;
  Lane lanes_[32];
};

inline int __shfl_xor_sync(unsigned mask, int own, int distance) {
  if (mask != 0xFFFFFFFFu) std::abort();
  EmulatedWarps& warps = *EmulatedWarps::current();
  return warps.exchange(own, warps.lane() ^ static_cast<unsigned>(distance));
}
inline double __shfl_sync(unsigned mask, double own, int lane) {
  if (mask != 0xFFFFFFFFu) std::abort();
  return EmulatedWarps::current()->exchange(own, static_cast<unsigned>(lane));
}

template <class Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  if (std::getenv("EMULATED_CUDA_ERROR")) return cudaErrorInvalidValue;
  if (block.x % 32) return cudaErrorInvalidValue;
  const adamops::DefaultFloatEnvironment as_on_a_gpu;
  EmulatedWarps(kernel, *static_cast<const Parameters*>(arguments[0]), grid, block);
  return cudaSuccess;
}
