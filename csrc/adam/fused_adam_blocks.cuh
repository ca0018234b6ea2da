// The CUDA kernel for all that fused_adam_kernel.cuh has no kernel of its own for: states in codes or of other dtypes
// than the param, masters in parts, rounding at random, zeroing grads, copies of the param. A warp takes a block of
// codes at a time, a thread eight elements that lie together, and asks for the dtypes at run time: all threads find the
// same, and what binds is the memory. As there: device code only, of CUDA nothing but built-ins.
#pragma once

#include "block_codes.h"
#include "fused_adam_kernel.cuh"
#include "rounding.h"

namespace adamops {

constexpr int kWarp = 32, kOwn = kCodeBlock / kWarp;  // elements of a thread
static_assert(kOwn == 8 && kChunk % kCodeBlock == 0, "a thread's elements in 16 bits are one access of 16 bytes");

// With integers, for block_codes.h and rounding.h.
struct CudaBitOps : CudaOps {
  using Integers = int32_t;
  static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
  static __device__ int32_t bits(float a) { return static_cast<int32_t>(__float_as_uint(a)); }
  static __device__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ float to_number(int32_t a) { return static_cast<float>(a); }
  static __device__ int32_t truncated(float a) { return static_cast<int32_t>(a); }
  static __device__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
};

// Integers of 8 or 16 bits, as many as a thread has, in one access.
template <class T>
__device__ inline void load_integers(const T* from, int32_t (&to)[kOwn]) {
  constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[kOwn / kPerWord];
  if constexpr (sizeof(T) == 1) {
    const uint2 loaded = *reinterpret_cast<const uint2*>(from);
    words[0] = loaded.x, words[1] = loaded.y;
  } else {
    const uint4 loaded = *reinterpret_cast<const uint4*>(from);
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    to[i] = static_cast<T>(words[i / kPerWord] >> (8 * sizeof(T) * (static_cast<uint32_t>(i) % kPerWord)));
}
template <class T>
__device__ inline void store_integers(T* to, const int32_t (&from)[kOwn]) {
  constexpr int kPerWord = 4 / sizeof(T);
  constexpr uint32_t kMask = (1u << (8 * sizeof(T))) - 1;
  uint32_t words[kOwn / kPerWord] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    words[i / kPerWord] |= (static_cast<uint32_t>(from[i]) & kMask)
                           << (8 * sizeof(T) * (static_cast<uint32_t>(i) % kPerWord));
  if constexpr (sizeof(T) == 1)
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
  else
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}

// The elements of a thread: `count` of them, which may be none, from `begin` on. They are moved at once where all are
// there and the tensor's columns are `aligned`, and otherwise one by one, with zeros for what is not there.
struct OwnElements {
  int64_t begin;
  int count;
  bool at_once;

  __device__ OwnElements(int64_t begin, int64_t end, bool aligned)
      : begin(begin),
        count(end - begin >= kOwn ? kOwn
              : end > begin       ? static_cast<int>(end - begin)
                                  : 0),
        at_once(aligned && count == kOwn) {}

  template <class T>
  __device__ void load_as(const void* column, float (&to)[kOwn]) const {
    const T* const from = static_cast<const T*>(column) + begin;
    if (at_once) return load<kOwn>(from, to);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) to[i] = i < count ? widen(T{}, load_bits(from + i)) : 0.0f;
  }
  template <class T>
  __device__ void store_as(void* column, const float (&from)[kOwn]) const {
    T* const to = static_cast<T*>(column) + begin;
    if (at_once) return store<kOwn>(to, from);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i < count) store_bits(to + i, narrow(T{}, from[i]));
  }
  __device__ void load_floats(Dtype dtype, const void* column, float (&to)[kOwn]) const {
    if (dtype == kFloat32) return load_as<float>(column, to);
    if (dtype == kBfloat16) return load_as<bf16>(column, to);
    load_as<fp16>(column, to);
  }
  __device__ void store_floats(Dtype dtype, void* column, const float (&from)[kOwn]) const {
    if (dtype == kFloat32) return store_as<float>(column, from);
    if (dtype == kBfloat16) return store_as<bf16>(column, from);
    store_as<fp16>(column, from);
  }

  template <class T>
  __device__ void load_numbers(const void* column, int32_t (&to)[kOwn]) const {
    const T* const from = static_cast<const T*>(column) + begin;
    if (at_once) return load_integers(from, to);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) to[i] = i < count ? from[i] : 0;
  }
  template <class T>
  __device__ void store_numbers(void* column, const int32_t (&from)[kOwn]) const {
    T* const to = static_cast<T*>(column) + begin;
    if (at_once) return store_integers(to, from);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (i < count) to[i] = static_cast<T>(from[i]);
  }
};

// States in codes -----------------------------------------------------------------------------------------------------

// The largest of a number of each thread of the warp, which must all call it.
__device__ inline int32_t largest_of_warp(int32_t own) {
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2)
    own = CudaBitOps::larger(own, __shfl_xor_sync(0xFFFFFFFFu, own, distance));
  return own;
}

__device__ inline int32_t magnitude_bits(float x) {
  return CudaBitOps::bits(x) & kMagnitudeBits;
}
__device__ inline int32_t largest_magnitude(const float (&x)[kOwn]) {
  int32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) largest = CudaBitOps::larger(largest, magnitude_bits(x[i]));
  return largest_of_warp(largest);
}

template <class Code, class Byte>
__device__ inline void decode_own(const OwnElements& own, const void* column, uint16_t scale, float (&to)[kOwn]) {
  int32_t codes[kOwn];
  own.load_numbers<Byte>(column, codes);
  const float unit = __fmul_rn(scale_in_fp32<CudaBitOps>(scale), Code::kUnit);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    to[i] = decode<Code, CudaBitOps>(codes[i], unit);
    if (Code::kSigned && (scale & kHasNotFinite) && codes[i] == kNotFinite) to[i] = __uint_as_float(0x7FC00000u);
  }
}

// `not_finite` are the elements, as bits, of which a state is not.
template <class Code, class Byte>
__device__ inline void encode_own(const OwnElements& own, const float (&from)[kOwn], int32_t largest, uint32_t step,
                                  uint32_t not_finite, void* column, uint16_t* scale) {
  const uint16_t common = block_scale(largest);
  const float inverse = inverse_scale<Code, CudaBitOps>(common);
  int32_t codes[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float noise = __uint_as_float(kNoiseBits | noise_of<Code>(own.begin + i, step));
    codes[i] = encode<Code, CudaBitOps>(from[i], inverse, noise) - kCodeOffset;
    if (!Code::kSigned) codes[i] = CudaBitOps::larger(codes[i], least_code(CudaBitOps::bits(from[i])));
    if (Code::kSigned && (not_finite >> i & 1u)) codes[i] = kNotFinite;
  }
  own.store_numbers<Byte>(column, codes);
  *scale = common;
}

// The states of a thread's elements.
struct OwnStates {
  float exp_avg[kOwn], exp_avg_sq[kOwn], max_exp_avg_sq[kOwn];
};

template <bool Amsgrad>
__device__ inline void load_states(const OwnElements& own, const AdamTensor& tensor, Dtype dtype,
                                   const uint16_t* scales, OwnStates& states) {
  if (dtype == kBlockCodes) {
    decode_own<SignedCode, int8_t>(own, tensor.exp_avg, scales[0], states.exp_avg);
    decode_own<UnsignedCode, uint8_t>(own, tensor.exp_avg_sq, scales[1], states.exp_avg_sq);
    if constexpr (Amsgrad)
      decode_own<UnsignedCode, uint8_t>(own, tensor.max_exp_avg_sq, scales[2], states.max_exp_avg_sq);
  } else {
    own.load_floats(dtype, tensor.exp_avg, states.exp_avg);
    own.load_floats(dtype, tensor.exp_avg_sq, states.exp_avg_sq);
    if constexpr (Amsgrad) own.load_floats(dtype, tensor.max_exp_avg_sq, states.max_exp_avg_sq);
  }
}

template <bool Amsgrad>
__device__ inline void encode_states(const OwnElements& own, const AdamTensor& tensor, uint32_t step, uint16_t* scales,
                                     OwnStates& states) {
  int32_t most_m = largest_magnitude(states.exp_avg), most_v = largest_magnitude(states.exp_avg_sq), most_max_v = 0;
  if constexpr (Amsgrad) most_max_v = largest_magnitude(states.max_exp_avg_sq);
  const bool all_finite = most_m < kInfinity && most_v < kInfinity && most_max_v < kInfinity;
  uint32_t not_finite = 0;
  if (!all_finite) {  // the same for the whole warp
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (magnitude_bits(states.exp_avg[i]) < kInfinity && magnitude_bits(states.exp_avg_sq[i]) < kInfinity &&
          !(Amsgrad && magnitude_bits(states.max_exp_avg_sq[i]) >= kInfinity))
        continue;
      not_finite |= 1u << i;
      states.exp_avg[i] = states.exp_avg_sq[i] = 0.0f;
      if (Amsgrad) states.max_exp_avg_sq[i] = 0.0f;
    }
    most_m = largest_magnitude(states.exp_avg), most_v = largest_magnitude(states.exp_avg_sq);
    if constexpr (Amsgrad) most_max_v = largest_magnitude(states.max_exp_avg_sq);
  }
  uint16_t found[3];
  encode_own<SignedCode, int8_t>(own, states.exp_avg, most_m, step, not_finite, tensor.exp_avg, found);
  encode_own<UnsignedCode, uint8_t>(own, states.exp_avg_sq, most_v, step, 0, tensor.exp_avg_sq, found + 1);
  if constexpr (Amsgrad)
    encode_own<UnsignedCode, uint8_t>(own, states.max_exp_avg_sq, most_max_v, step, 0, tensor.max_exp_avg_sq,
                                      found + 2);
  if (threadIdx.x % kWarp == 0) {
    scales[0] = all_finite ? found[0] : found[0] | kHasNotFinite;
    scales[1] = found[1];
    if constexpr (Amsgrad) scales[2] = found[2];
  }
}

// Params and their masters --------------------------------------------------------------------------------------------

template <class Rest>
__device__ inline void join(const OwnElements& own, const AdamTensor& tensor, bf16, float (&to)[kOwn]) {
  int32_t upper[kOwn], rest[kOwn];
  own.load_numbers<uint16_t>(tensor.param, upper);
  own.load_numbers<Rest>(tensor.master, rest);
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    to[i] = __uint_as_float(Bf16Remainder<8 * sizeof(Rest)>::join(static_cast<uint32_t>(upper[i]), rest[i]));
}
template <class Rest>
__device__ inline void join(const OwnElements& own, const AdamTensor& tensor, fp16, float (&to)[kOwn]) {
  int32_t rest[kOwn];
  own.load_as<fp16>(tensor.param, to);
  own.load_numbers<Rest>(tensor.master, rest);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) to[i] = Fp16Remainder<8 * sizeof(Rest), CudaBitOps>::join(to[i], rest[i]);
}

template <class Rest>
__device__ inline void split(const OwnElements& own, const AdamTensor& tensor, bf16, const float (&from)[kOwn],
                             bool at_random, const uint32_t (&random)[kOwn]) {
  using Remainder = Bf16Remainder<8 * sizeof(Rest)>;
  int32_t upper[kOwn], rest[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    uint32_t param;
    Remainder::split(__float_as_uint(from[i]), at_random ? random[i] : Remainder::kHalf, param, rest[i]);
    upper[i] = static_cast<int32_t>(param);
  }
  own.store_numbers<uint16_t>(tensor.param, upper);
  own.store_numbers<Rest>(tensor.master, rest);
}
template <class Rest>
__device__ inline void split(const OwnElements& own, const AdamTensor& tensor, fp16, const float (&from)[kOwn],
                             bool at_random, const uint32_t (&random)[kOwn]) {
  using Remainder = Fp16Remainder<8 * sizeof(Rest), CudaBitOps>;
  int32_t upper[kOwn], rest[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const float noise = at_random && sizeof(Rest) == 1
                            ? __fmul_rn(static_cast<float>(static_cast<int32_t>(random[i] & 0xFFFFu)), 0x1p-16f)
                            : 0.5f;
    uint32_t param = narrow(fp16{}, from[i]);
    if (Remainder::overflows(from[i], widen(fp16{}, param), noise)) param += param & 0x8000u ? 0xFFFFu : 1u;
    upper[i] = static_cast<int32_t>(param & 0xFFFFu);
    rest[i] = Remainder::rest(from[i], widen(fp16{}, param & 0xFFFFu), noise);
  }
  own.store_numbers<uint16_t>(tensor.param, upper);
  own.store_numbers<Rest>(tensor.master, rest);
}

__device__ inline void load_param(const OwnElements& own, const AdamTensor& tensor, AdamDtypes dtypes,
                                  float (&to)[kOwn]) {
  if (dtypes.master == kNoMaster) return own.load_floats(dtypes.param, tensor.param, to);
  if (dtypes.master == kMasterFp32) return own.load_as<float>(tensor.master, to);
  if (dtypes.param == kBfloat16)
    return dtypes.master == kRemainder8 ? join<int8_t>(own, tensor, bf16{}, to)
                                        : join<int16_t>(own, tensor, bf16{}, to);
  dtypes.master == kRemainder8 ? join<int8_t>(own, tensor, fp16{}, to) : join<int16_t>(own, tensor, fp16{}, to);
}

__device__ inline void store_param(const OwnElements& own, const AdamTensor& tensor, AdamDtypes dtypes,
                                   const float (&from)[kOwn], bool at_random, uint32_t step) {
  uint32_t random[kOwn] = {};
  if (at_random) {
    const auto index = static_cast<uint64_t>(own.begin);
    const uint32_t key = random_key(tensor.stream, step, static_cast<uint32_t>(index >> 32));
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      random[i] = random_bits(key, static_cast<uint32_t>(index) + static_cast<uint32_t>(i));
  }
  if (dtypes.master == kRemainder8 || dtypes.master == kRemainder16) {
    const bool small = dtypes.master == kRemainder8;
    if (dtypes.param == kBfloat16)
      return small ? split<int8_t>(own, tensor, bf16{}, from, at_random, random)
                   : split<int16_t>(own, tensor, bf16{}, from, at_random, random);
    return small ? split<int8_t>(own, tensor, fp16{}, from, at_random, random)
                 : split<int16_t>(own, tensor, fp16{}, from, at_random, random);
  }
  if (dtypes.master == kMasterFp32) own.store_as<float>(tensor.master, from);
  if (!at_random || dtypes.master != kNoMaster || dtypes.param == kFloat32)
    return own.store_floats(dtypes.param, tensor.param, from);
  float rounded[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t bits = __float_as_uint(from[i]);
    rounded[i] = __uint_as_float(dtypes.param == kBfloat16 ? stochastic_bf16(bits, random[i])
                                                           : stochastic_fp16<CudaBitOps>(bits, random[i]));
  }
  own.store_floats(dtypes.param, tensor.param, rounded);
}

// A step --------------------------------------------------------------------------------------------------------------

// Whether all columns of a tensor may be moved by 16 bytes at a time.
__device__ inline bool is_aligned(const AdamTensor& tensor) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(tensor.max_exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(tensor.master) | reinterpret_cast<uintptr_t>(tensor.lowp_out);
  return addresses % 16 == 0;
}

// One step for a launch's tensors, a block of threads a chunk, a warp a block of codes. Where the step is skipped,
// grads are zeroed and params copied all the same.
template <bool Amsgrad>
__global__ void __launch_bounds__(kThreads, 2) adam_blocks_kernel(const __grid_constant__ AdamLaunch launch) {
  const bool skipped = launch.found_inf && *launch.found_inf != 0.0f;
  const uint32_t index = tensor_of_block(launch.first_block, launch.count, blockIdx.x);
  const AdamTensor& tensor = launch.tensors[index];
  const AdamDtypes dtypes = launch.dtypes;
  const AdamScalars& scalars = launch.device_scalars ? launch.device_scalars[launch.rows[index]] : launch.scalars;
  const AdamConstants<CudaOps> k(scalars);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x - launch.first_block[index]) * kChunk;
  const int64_t end = chunk + kChunk < tensor.numel ? chunk + kChunk : tensor.numel;
  const bool aligned = is_aligned(tensor);

  for (int64_t block = chunk + threadIdx.x / kWarp * kCodeBlock; block < end; block += kThreads / kWarp * kCodeBlock) {
    const OwnElements own(block + threadIdx.x % kWarp * kOwn, end, aligned);
    float param[kOwn], grad[kOwn];
    load_param(own, tensor, dtypes, param);
    if (!skipped) {
      OwnStates states;
      uint16_t* const scales = tensor.scales ? tensor.scales + block / kCodeBlock * (Amsgrad ? 3 : 2) : nullptr;
      own.load_floats(dtypes.grad, tensor.grad, grad);
      load_states<Amsgrad>(own, tensor, dtypes.state, scales, states);
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        adam_update<Amsgrad, CudaOps>(k, launch.mode.l2, param[i], grad[i], states.exp_avg[i], states.exp_avg_sq[i],
                                      states.max_exp_avg_sq[i]);
      store_param(own, tensor, dtypes, param, launch.mode.stochastic_rounding, scalars.step);
      if (dtypes.state == kBlockCodes) {
        encode_states<Amsgrad>(own, tensor, scalars.step, scales, states);
      } else {
        own.store_floats(dtypes.state, tensor.exp_avg, states.exp_avg);
        own.store_floats(dtypes.state, tensor.exp_avg_sq, states.exp_avg_sq);
        if constexpr (Amsgrad) own.store_floats(dtypes.state, tensor.max_exp_avg_sq, states.max_exp_avg_sq);
      }
    }
    if (tensor.lowp_out) own.store_floats(dtypes.lowp_out, tensor.lowp_out, param);
    if (launch.mode.zero_grads) {
      const float zeros[kOwn] = {};
      own.store_floats(dtypes.grad, tensor.grad, zeros);
    }
  }
}

}  // namespace adamops
