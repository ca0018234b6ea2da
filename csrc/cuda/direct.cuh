// The CUDA kernels: the rule's update of many tensors in one launch, and the scalars of a step computed on the device.
// Device code only, with nothing of CUDA but built-ins, so that tests can run this very source on the host
// (tests/cuda_emulation).
#pragma once

#include <cstdint>

#include "cuda/launches.h"
#include "formats/average_rounding.h"
#include "formats/half.h"
#include "rules/selected.h"
#include "state_format.h"

namespace adamops {

// The kernel's parameters hold everything that a launch needs, so that it is CUDA-graph capturable and nothing is
// copied to the device first. They may take 32 764 bytes since CUDA 12.1, and 4096 before (CUDA C++ Programming Guide,
// "Kernel Parameters").
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kParameterBytes = 4096;
#else
constexpr int kParameterBytes = 32764;
#endif
constexpr int kTensorsPerLaunch =
    (kParameterBytes - 56 - sizeof(StepScalars)) / (sizeof(Tensor) + 2 * sizeof(uint32_t));
constexpr int kThreads = 256;
constexpr int kChunk = 4096;  // elements per thread block

struct StepLaunch {
  StepScalars scalars;                // of all tensors, if device_scalars is null
  const StepScalars* device_scalars;  // or one per tensor, by its row
  const float* found_inf;             // not null: if it is not 0, the step is skipped
  Dtypes dtypes;
  StepOptions options;
  uint32_t count;
  uint32_t first_block[kTensorsPerLaunch + 1];
  uint32_t rows[kTensorsPerLaunch];
  Tensor tensors[kTensorsPerLaunch];
};
static_assert(sizeof(StepLaunch) <= kParameterBytes, "the parameters of a launch are too large");

// A float. Each operation rounds once: intrinsics, since plain operators may be fused after PTX.
struct CudaOps {
  using Number = float;
  static __device__ float set(float x) { return x; }
  static __device__ float mul(float a, float b) { return __fmul_rn(a, b); }
  static __device__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static __device__ float div(float a, float b) { return __fdiv_rn(a, b); }
  static __device__ float sqrt(float a) { return __fsqrt_rn(a); }
  static __device__ float max(float a, float b) { return a > b || a != a ? a : b; }  // NaN where either is NaN
};

struct CudaDoubleOps {
  static __device__ double mul(double a, double b) { return __dmul_rn(a, b); }
  static __device__ double add(double a, double b) { return __dadd_rn(a, b); }
  static __device__ double sub(double a, double b) { return __dsub_rn(a, b); }
  static __device__ double div(double a, double b) { return __ddiv_rn(a, b); }
  static __device__ double sqrt(double a) { return __dsqrt_rn(a); }
  static __device__ float to_float(double a) { return __double2float_rn(a); }
};

// Conversions between stored bits and floats: widening is exact; narrowing rounds to nearest even and keeps NaN.
__device__ inline float widen(float, uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ inline float widen(bf16, uint32_t bits) {
  return __uint_as_float(bits << 16);
}
__device__ inline float widen(fp16, uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
__device__ inline uint32_t narrow(float, float a) {
  return __float_as_uint(a);
}
__device__ inline uint32_t narrow(bf16, float a) {
  const uint32_t bits = __float_as_uint(a);
  return (a != a ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}
__device__ inline uint32_t narrow(fp16, float a) {
  return __half_as_ushort(__float2half_rn(a));
}

// How floats are narrowed: to nearest, or as the state of this index in a step, whose averages have noise if they are
// bfloat16.
struct ToNearest {
  template <class T>
  __device__ uint32_t operator()(T type, float a) const {
    return narrow(type, a);
  }
};
template <int kIndex>
struct AsState {
  using Format = FormatOf<kIndex>;
  uint32_t step;

  template <class T>
  __device__ uint32_t operator()(T type, float a) const {
    return narrow(type, a);
  }
  __device__ uint32_t operator()(bf16 type, float a) const {
    if constexpr (Rule::kStates[kIndex].rounding == kNearest) return narrow(type, a);
    return rounded_average<Format>(__float_as_uint(a), a != a ? 0 : average_noise<Format>(step)) >> 16;
  }
};

__device__ inline uint32_t load_bits(const float* from) {
  return __float_as_uint(*from);
}
__device__ inline uint32_t load_bits(const bf16* from) {
  return from->bits;
}
__device__ inline uint32_t load_bits(const fp16* from) {
  return from->bits;
}
__device__ inline void store_bits(float* to, uint32_t bits) {
  *to = __uint_as_float(bits);
}
__device__ inline void store_bits(bf16* to, uint32_t bits) {
  to->bits = static_cast<uint16_t>(bits);
}
__device__ inline void store_bits(fp16* to, uint32_t bits) {
  to->bits = static_cast<uint16_t>(bits);
}

// `Width` elements in memory to and from floats: in accesses of 16 bytes, or one by one if Width is 1.
template <int Width, class T>
__device__ inline void load(const T* from, float (&to)[Width]) {
  if constexpr (Width == 1) {
    to[0] = widen(T{}, load_bits(from));
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int quad = 0; quad < Width / (4 * kPerWord); ++quad) {
      const uint4 loaded = reinterpret_cast<const uint4*>(from)[quad];
      const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
      for (int i = 0; i < 4 * kPerWord; ++i) {
        const uint32_t word = words[i / kPerWord];
        to[quad * 4 * kPerWord + i] = widen(T{}, sizeof(T) == 4 ? word : i % 2 ? word >> 16 : word & 0xFFFFu);
      }
    }
  }
}

template <int Width, class T, class Narrow = ToNearest>
__device__ inline void store(T* to, const float (&from)[Width], const Narrow& narrow = {}) {
  if constexpr (Width == 1) {
    store_bits(to, narrow(T{}, from[0]));
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int quad = 0; quad < Width / (4 * kPerWord); ++quad) {
      uint32_t words[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const float* const first = from + (quad * 4 + word) * kPerWord;
        words[word] = narrow(T{}, first[0]);
        if constexpr (kPerWord == 2) words[word] |= narrow(T{}, first[1]) << 16;
      }
      // Not an assignment, which nvcc splits up in places.
      __stwb(reinterpret_cast<uint4*>(to) + quad, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// The columns of a tensor that a kernel is compiled for. (The rule's mode is not among them: it is an instruction or
// two, and would double what there is to compile.)
template <class Param, class Grad, class State, bool kHasMaster, int kStateCount>
struct TensorKind {
  using ParamType = Param;
  using GradType = Grad;
  using StateType = State;
  using States = Indices<kStateCount>;
  static constexpr bool kMaster = kHasMaster;
  // Elements that a thread takes at a time, so that the narrowest column is accessed in units of 16 bytes.
  static constexpr bool kAllFloats =
      sizeof(Param) == 4 && sizeof(Grad) == 4 && (kStateCount == 0 || sizeof(State) == 4);
  static constexpr int kWidth = kAllFloats ? 4 : 8;
};

// One step of the rule.
template <int kStateCount, class Ops, class Number>
__device__ inline void update(const Constants<Ops>& k, int mode, Number& param, const Number& grad, Number* state) {
  Rule::finish<Ops>(k.rule, param, Rule::start<kStateCount, Ops>(k.rule, mode, param, k.scaled(grad), state));
}

template <class Kind, int Width, int... kIndex>
__device__ inline void update_elements(IndexList<kIndex...>, const Tensor& tensor, int64_t i,
                                       const Constants<CudaOps>& k, [[maybe_unused]] uint32_t step, int mode) {
  using State = typename Kind::StateType;
  auto* const param = static_cast<typename Kind::ParamType*>(tensor.param) + i;
  const auto* const grad = static_cast<const typename Kind::GradType*>(tensor.grad) + i;
  float p[Width], g[Width], states[kMostStates][Width];
  if constexpr (Kind::kMaster)
    load<Width>(static_cast<const float*>(tensor.master) + i, p);
  else
    load<Width>(param, p);
  load<Width>(grad, g);
  (load<Width>(static_cast<const State*>(tensor.states[kIndex]) + i, states[kIndex]), ...);
#pragma unroll
  for (int j = 0; j < Width; ++j) {
    float state[kMostStates] = {states[kIndex][j]...};
    update<sizeof...(kIndex)>(k, mode, p[j], g[j], state);
    ((states[kIndex][j] = state[kIndex]), ...);
  }
  store<Width>(param, p);
  if constexpr (Kind::kMaster) store<Width>(static_cast<float*>(tensor.master) + i, p);
  (store<Width>(static_cast<State*>(tensor.states[kIndex]) + i, states[kIndex], AsState<kIndex>{step}), ...);
}

// Whether all columns of a tensor may be accessed 16 bytes at a time.
__device__ inline bool is_aligned(const Tensor& tensor) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                        reinterpret_cast<uintptr_t>(tensor.master) | reinterpret_cast<uintptr_t>(tensor.lowp_out);
#pragma unroll
  for (const void* const state : tensor.states) addresses |= reinterpret_cast<uintptr_t>(state);
  return addresses % 16 == 0;
}

// The tensor that a thread block works on: the last of `count` whose first thread block is not after it.
__device__ inline uint32_t tensor_of_block(const uint32_t* first_block, uint32_t count, uint32_t block) {
  uint32_t low = 0, high = count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (first_block[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// One step for a launch's tensors, one thread block per chunk. Asks for at least two thread blocks per multiprocessor:
// left to itself, ptxas aims at more on sm_100 and sm_120, and spills.
template <class Kind>
__global__ void __launch_bounds__(kThreads, 2) direct_kernel(const __grid_constant__ StepLaunch launch) {
  if (launch.found_inf && *launch.found_inf != 0.0f) return;
  const uint32_t index = tensor_of_block(launch.first_block, launch.count, blockIdx.x);
  const Tensor& tensor = launch.tensors[index];
  const StepScalars& scalars = launch.device_scalars ? launch.device_scalars[launch.rows[index]] : launch.scalars;
  const Constants<CudaOps> k(scalars, true);
  const uint32_t step = scalars.step;
  const int mode = launch.options.mode;
  const int64_t begin = static_cast<int64_t>(blockIdx.x - launch.first_block[index]) * kChunk;
  const int64_t end = begin + kChunk < tensor.numel ? begin + kChunk : tensor.numel;

  constexpr int kWidth = Kind::kWidth;
  constexpr typename Kind::States kStates;
  const int64_t whole = is_aligned(tensor) ? begin + (end - begin) / kWidth * kWidth : begin;
  for (int64_t i = begin + threadIdx.x * kWidth; i < whole; i += kThreads * kWidth)
    update_elements<Kind, kWidth>(kStates, tensor, i, k, step, mode);
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads)
    update_elements<Kind, 1>(kStates, tensor, i, k, step, mode);
}

// For tensors that keep their step counts on the device, as float32, each in memory of its own.
constexpr int kStepsPerLaunch = (kParameterBytes - 128) / sizeof(float*);

struct ScalarsLaunch {
  Rule::Hyper hyper;
  bool maximize;
  const float* lr32;          // not null: read the learning rate from here instead
  const double* lr64;         // or from here
  const float* loss_scale;    // null: 1
  const double* grad_factor;  // null: 1
  const float* found_inf;     // not null: if it is not 0, no step is counted
  StepScalars* scalars;       // output, one per tensor
  uint32_t count;
  float* steps[kStepsPerLaunch];
};
static_assert(sizeof(ScalarsLaunch) <= kParameterBytes, "the parameters of a launch are too large");

// Counts the step of each tensor and computes its scalars, one thread per tensor.
static __global__ void __launch_bounds__(kThreads) scalars_kernel(const __grid_constant__ ScalarsLaunch launch) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= launch.count || (launch.found_inf && *launch.found_inf != 0.0f)) return;
  Rule::Hyper hyper = launch.hyper;
  if (launch.lr32) hyper.lr = *launch.lr32;
  if (launch.lr64) hyper.lr = *launch.lr64;
  const float count = __fadd_rn(*launch.steps[i], 1.0f);
  *launch.steps[i] = count;
  const auto step = static_cast<int64_t>(count);
  const double loss_scale = launch.loss_scale ? static_cast<double>(*launch.loss_scale) : 1.0;
  const double grad_factor = launch.grad_factor ? *launch.grad_factor : 1.0;
  launch.scalars[i] = {grad_scale<CudaDoubleOps>(launch.maximize, loss_scale, grad_factor),
                       Rule::scalars<CudaDoubleOps>(hyper, step), static_cast<uint32_t>(step)};
}

}  // namespace adamops
