// The CUDA kernel for everything without a kernel of its own in cuda/direct.cuh: quantized states, other
// combinations of dtypes, split master weights, stochastic rounding, zeroing of grads, 16-bit copies of the param. A
// warp takes one quantization block at a time, a thread eight adjacent elements of it. Whether states are quantized,
// and whether the quantization block is full, is known at compile time. Dtypes are tested at run time, and all threads
// take the same branch. As there: device code only, with nothing of CUDA but built-ins.
#pragma once

#include "cuda/direct.cuh"
#include "cuda/numbers.cuh"
#include "formats/quantized_blocks.h"
#include "formats/split_masters.h"

namespace adamops {

static_assert(kElementsPerThread == 8 && kChunk % kQuantizationBlock == 0,
              "a thread's elements in 16 bits are one access of 16 bytes");

// As many integers of 8 or 16 bits as a thread has elements, packed into words, the first one lowest.
template <class T>
struct Words {
  static constexpr int kPerWord = 4 / sizeof(T), kCount = kElementsPerThread / kPerWord;
  uint32_t words[kCount];

  __device__ int32_t number(int i) const {
    return static_cast<T>(words[i / kPerWord] >> (8 * sizeof(T) * (static_cast<uint32_t>(i) % kPerWord)));
  }
  // Packs the lowest bits of integers.
  static __device__ Words packed(const int32_t (&from)[kElementsPerThread]) {
    Words packed;
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      const int32_t* const first = from + word * kPerWord;
      if constexpr (sizeof(T) == 1)
        packed.words[word] = __byte_perm(pair(first, 0x0040), pair(first + 2, 0x0040), 0x5410);
      else
        packed.words[word] = pair(first, 0x5410);
    }
    return packed;
  }

 private:
  static __device__ uint32_t pair(const int32_t* two, uint32_t selector) {
    return __byte_perm(static_cast<uint32_t>(two[0]), static_cast<uint32_t>(two[1]), selector);
  }
};

// The elements of a thread, from `begin` on. If `Whole`, all kElementsPerThread are there and the tensor's columns are
// aligned, so they are moved at once. Otherwise only `count` are there, possibly none; they are moved one by one, with
// zeros for the missing ones.
template <bool Whole>
struct OwnElements {
  int64_t begin;
  int count;

  __device__ OwnElements(int64_t begin, int64_t end)
      : begin(begin),
        count(Whole || end - begin >= kElementsPerThread ? kElementsPerThread
              : end > begin                              ? static_cast<int>(end - begin)
                                                         : 0) {}

  template <class T>
  __device__ void load_as(const void* column, OwnFloats& to) const {
    const T* const from = static_cast<const T*>(column) + begin;
    if constexpr (Whole) {
      load<kElementsPerThread>(from, to.x);
    } else {
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i) to[i] = i < count ? widen(T{}, load_bits(from + i)) : 0.0f;
    }
  }
  template <class T, class Narrow = ToNearest>
  __device__ void store_as(void* column, const OwnFloats& from, const Narrow& narrow = {}) const {
    T* const to = static_cast<T*>(column) + begin;
    if constexpr (Whole) {
      store<kElementsPerThread>(to, from.x, narrow);
    } else {
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i)
        if (i < count) store_bits(to + i, narrow(T{}, from[i]));
    }
  }
  __device__ void load_floats(Dtype dtype, const void* column, OwnFloats& to) const {
    if (dtype == kFloat32) return load_as<float>(column, to);
    if (dtype == kBfloat16) return load_as<bf16>(column, to);
    load_as<fp16>(column, to);
  }
  template <class Narrow = ToNearest>
  __device__ void store_floats(Dtype dtype, void* column, const OwnFloats& from, const Narrow& narrow = {}) const {
    if (dtype == kFloat32) return store_as<float>(column, from, narrow);
    if (dtype == kBfloat16) return store_as<bf16>(column, from, narrow);
    store_as<fp16>(column, from, narrow);
  }

  template <class T>
  __device__ Words<T> load_words(const void* column) const {
    const T* const from = static_cast<const T*>(column) + begin;
    if constexpr (Whole && sizeof(T) == 1) {
      const uint2 loaded = *reinterpret_cast<const uint2*>(from);
      return {{loaded.x, loaded.y}};
    } else if constexpr (Whole) {
      const uint4 loaded = *reinterpret_cast<const uint4*>(from);
      return {{loaded.x, loaded.y, loaded.z, loaded.w}};
    } else {
      int32_t numbers[kElementsPerThread];
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i) numbers[i] = i < count ? from[i] : 0;
      return Words<T>::packed(numbers);
    }
  }
  template <class T>
  __device__ void store_words(void* column, const Words<T>& from) const {
    T* const to = static_cast<T*>(column) + begin;
    const auto& words = from.words;
    if constexpr (Whole && sizeof(T) == 1) {
      __stwb(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else if constexpr (Whole) {
      __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
#pragma unroll
      for (int i = 0; i < kElementsPerThread; ++i)
        if (i < count) to[i] = static_cast<T>(from.number(i));
    }
  }
};

// Quantized states ---------------------------------------------------------------------------------------------------

// The largest of one number per thread of the warp; all its threads must call this.
__device__ inline int32_t largest_of_warp(int32_t own) {
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2)
    own = CudaBitOps::larger(own, __shfl_xor_sync(0xFFFFFFFFu, own, distance));
  return own;
}

__device__ inline int32_t magnitude_bits(float x) {
  return CudaBitOps::bits(x) & kMagnitudeBits;
}
__device__ inline int32_t largest_magnitude(const OwnFloats& x) {
  int32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) largest = CudaBitOps::larger(largest, magnitude_bits(x[i]));
  return largest_of_warp(largest);
}

constexpr uint32_t kEveryByte = 0x01010101, kEverySign = 0x80808080;

template <int kIndex, bool Whole>
__device__ inline void dequantize_own(const OwnElements<Whole>& own, const void* column, uint16_t scale,
                                      OwnFloats& to) {
  using Format = FormatOf<kIndex>;
  constexpr bool kIsFirst = kIndex == 0;  // the state that marks elements that are not finite
  const auto quantized = own.template load_words<Byte<Format>>(column);
  const float unit = __fmul_rn(scale_in_fp32<CudaBitOps>(scale), Format::kUnit);
  // With its sign bit flipped, a signed byte is an unsigned one that is 128 more.
  constexpr uint32_t kTurned = Format::kSigned ? kEverySign : 0;
  constexpr float kZero = CudaBitOps::kWholes + (Format::kSigned ? 128.0f : 0.0f);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    const uint32_t turned = quantized.words[i / 4] ^ kTurned;
    const float value = __uint_as_float(__byte_perm(turned, CudaBitOps::kBitsOfWholes, 0x7650u | i % 4));
    to[i] = dequantize<Format, CudaBitOps>(__fadd_rn(value, -kZero), unit);
  }
  if (kIsFirst && (scale & kHasNotFinite)) {  // rare
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i)
      if (quantized.number(i) == Format::kNotFinite) to[i] = __uint_as_float(0x7FC00000u);
  }
}

// Returns the scale of the quantization block. `not_finite` has a bit set for each element of which a state is not
// finite, and `marks` says whether there are any in the quantization block.
template <int kIndex, bool Whole>
__device__ inline uint16_t quantize_own(const OwnElements<Whole>& own, const OwnFloats& from, int32_t largest,
                                        uint32_t step, bool marks, uint32_t not_finite, void* column) {
  using Format = FormatOf<kIndex>;
  constexpr bool kIsFirst = kIndex == 0;
  const uint16_t scale = block_scale(largest);
  const float inverse = inverse_scale<Format, CudaBitOps>(scale);
  int32_t quantized[kElementsPerThread];
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    const float noise = __uint_as_float(kNoiseBits | noise_of<Format>(own.begin + i, step));
    quantized[i] = quantize<Format, CudaBitOps>(from[i], inverse, noise);
  }
  static_assert(kQuantizedOffset == 128, "it is taken off by turning the highest bit");
  auto packed = Words<Byte<Format>>::packed(quantized);
#pragma unroll
  for (uint32_t& word : packed.words) word ^= kEverySign;
  uint32_t zeros = 0;  // nonzero if a byte is zero
#pragma unroll
  for (const uint32_t word : packed.words) zeros |= (word - kEveryByte) & ~word & kEverySign;
  if ((!Format::kSigned && zeros) || (kIsFirst && marks)) {  // rare
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      quantized[i] = packed.number(i);
      if (!Format::kSigned) quantized[i] = CudaBitOps::larger(quantized[i], least_quantized(CudaBitOps::bits(from[i])));
      if (kIsFirst && marks) {
        if (!Format::kSigned && quantized[i] == Format::kNotFinite) quantized[i] = Format::kMostFinite;
        if (not_finite >> i & 1u) quantized[i] = Format::kNotFinite;
      }
    }
    packed = Words<Byte<Format>>::packed(quantized);
  }
  own.store_words(column, packed);
  return scale;
}

template <bool kQuantizedStates, bool Whole, int... kIndex>
__device__ inline void load_states(IndexList<kIndex...>, const OwnElements<Whole>& own, const Tensor& tensor,
                                   [[maybe_unused]] Dtype dtype, const uint16_t* scales, OwnFloats* states) {
  if constexpr (kQuantizedStates)
    (dequantize_own<kIndex>(own, tensor.states[kIndex], scales[kIndex], states[kIndex]), ...);
  else
    (own.load_floats(dtype, tensor.states[kIndex], states[kIndex]), ...);
}

template <bool Whole, int... kIndex>
__device__ inline void quantize_states(IndexList<kIndex...>, const OwnElements<Whole>& own, const Tensor& tensor,
                                       uint32_t step, uint16_t* scales, OwnFloats* states) {
  int32_t most[] = {largest_magnitude(states[kIndex])...};
  const bool all_finite = ((most[kIndex] < kInfinity) && ...);
  uint32_t not_finite = 0;
  if (!all_finite) {  // uniform across the warp
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) {
      if (((magnitude_bits(states[kIndex][i]) < kInfinity) && ...)) continue;
      not_finite |= 1u << i;
      ((states[kIndex][i] = 0.0f), ...);
    }
    ((most[kIndex] = largest_magnitude(states[kIndex])), ...);
  }
  uint16_t own_scales[] = {
      quantize_own<kIndex>(own, states[kIndex], most[kIndex], step, !all_finite, not_finite, tensor.states[kIndex])...};
  if (!all_finite) own_scales[0] |= kHasNotFinite;
  if (threadIdx.x % kWarp == 0) ((scales[kIndex] = own_scales[kIndex]), ...);
}

// Params and their master weights ------------------------------------------------------------------------------------

template <class Integer, bool Whole>
__device__ inline void join(const OwnElements<Whole>& own, const Tensor& tensor, bf16, OwnFloats& to) {
  const Words<uint16_t> upper = own.template load_words<uint16_t>(tensor.param);
  const Words<Integer> remainder = own.template load_words<Integer>(tensor.master);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i)
    to[i] = __uint_as_float(
        Bf16Remainder<8 * sizeof(Integer)>::join(static_cast<uint32_t>(upper.number(i)), remainder.number(i)));
}
template <class Integer, bool Whole>
__device__ inline void join(const OwnElements<Whole>& own, const Tensor& tensor, fp16, OwnFloats& to) {
  own.template load_as<fp16>(tensor.param, to);
  const Words<Integer> remainder = own.template load_words<Integer>(tensor.master);
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i)
    to[i] = Fp16Remainder<8 * sizeof(Integer), CudaBitOps>::join(to[i], remainder.number(i));
}

template <class Integer, bool Whole>
__device__ inline void split(const OwnElements<Whole>& own, const Tensor& tensor, bf16, const OwnFloats& from,
                             bool at_random, const uint32_t (&random)[kElementsPerThread]) {
  using Remainder = Bf16Remainder<8 * sizeof(Integer)>;
  int32_t upper[kElementsPerThread], remainder[kElementsPerThread];
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    uint32_t param;
    Remainder::split(__float_as_uint(from[i]), at_random ? random[i] : Remainder::kHalf, param, remainder[i]);
    upper[i] = static_cast<int32_t>(param);
  }
  own.store_words(tensor.param, Words<uint16_t>::packed(upper));
  own.store_words(tensor.master, Words<Integer>::packed(remainder));
}
template <class Integer, bool Whole>
__device__ inline void split(const OwnElements<Whole>& own, const Tensor& tensor, fp16, const OwnFloats& from,
                             bool at_random, const uint32_t (&random)[kElementsPerThread]) {
  using Remainder = Fp16Remainder<8 * sizeof(Integer), CudaBitOps>;
  int32_t upper[kElementsPerThread], remainder[kElementsPerThread];
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    const float noise = at_random && sizeof(Integer) == 1
                            ? __fmul_rn(static_cast<float>(static_cast<int32_t>(random[i] & 0xFFFFu)), 0x1p-16f)
                            : 0.5f;
    uint32_t param = narrow(fp16{}, from[i]);
    if (Remainder::overflows(from[i], widen(fp16{}, param), noise)) param += param & 0x8000u ? 0xFFFFu : 1u;
    upper[i] = static_cast<int32_t>(param & 0xFFFFu);
    remainder[i] = Remainder::of(from[i], widen(fp16{}, param & 0xFFFFu), noise);
  }
  own.store_words(tensor.param, Words<uint16_t>::packed(upper));
  own.store_words(tensor.master, Words<Integer>::packed(remainder));
}

template <bool Whole>
__device__ inline void load_param(const OwnElements<Whole>& own, const Tensor& tensor, Dtypes dtypes, OwnFloats& to) {
  if (dtypes.master == kNoMaster) return own.load_floats(dtypes.param, tensor.param, to);
  if (dtypes.master == kMasterFp32) return own.template load_as<float>(tensor.master, to);
  if (dtypes.param == kBfloat16)
    return dtypes.master == kRemainder8 ? join<int8_t>(own, tensor, bf16{}, to)
                                        : join<int16_t>(own, tensor, bf16{}, to);
  dtypes.master == kRemainder8 ? join<int8_t>(own, tensor, fp16{}, to) : join<int16_t>(own, tensor, fp16{}, to);
}

template <bool Whole>
__device__ inline void store_param(const OwnElements<Whole>& own, const Tensor& tensor, Dtypes dtypes,
                                   const OwnFloats& from, bool at_random, uint32_t step) {
  uint32_t random[kElementsPerThread] = {};
  if (at_random) {
    const auto index = static_cast<uint64_t>(own.begin);
    const uint32_t key = random_key(tensor.rng_offset, step, static_cast<uint32_t>(index >> 32));
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i)
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
  if (dtypes.master == kMasterFp32) own.template store_as<float>(tensor.master, from);
  if (!at_random || dtypes.master != kNoMaster || dtypes.param == kFloat32)
    return own.store_floats(dtypes.param, tensor.param, from);
  OwnFloats rounded;
#pragma unroll
  for (int i = 0; i < kElementsPerThread; ++i) {
    const uint32_t bits = __float_as_uint(from[i]);
    rounded[i] = __uint_as_float(dtypes.param == kBfloat16 ? stochastic_bf16(bits, random[i])
                                                           : stochastic_fp16<CudaBitOps>(bits, random[i]));
  }
  own.store_floats(dtypes.param, tensor.param, rounded);
}

// A step --------------------------------------------------------------------------------------------------------------

template <bool Whole, int... kIndex>
__device__ inline void store_states(IndexList<kIndex...>, const OwnElements<Whole>& own, const Tensor& tensor,
                                    [[maybe_unused]] Dtype dtype, [[maybe_unused]] uint32_t step,
                                    const OwnFloats* states) {
  (own.store_floats(dtype, tensor.states[kIndex], states[kIndex], AsState<kIndex>{step}), ...);
}

// One step for a thread's elements of a quantization block. If the step is skipped, grads are zeroed and params are
// copied all the same.
template <int kStateCount, bool kQuantizedStates, bool Whole>
__device__ inline void update_own(const OwnElements<Whole>& own, const StepLaunch& launch, const Tensor& tensor,
                                  const Constants<CudaOwnOps>& k, uint32_t step, int64_t block, bool skipped) {
  constexpr Indices<kStateCount> kIndices;
  const Dtypes dtypes = launch.dtypes;
  OwnFloats param, grad;
  load_param(own, tensor, dtypes, param);
  if (!skipped) {
    OwnFloats states[kMostStates];
    uint16_t* const scales = kQuantizedStates ? tensor.scales + block / kQuantizationBlock * kStateCount : nullptr;
    own.load_floats(dtypes.grad, tensor.grad, grad);
    load_states<kQuantizedStates>(kIndices, own, tensor, dtypes.state, scales, states);
    update<kStateCount>(k, launch.options.mode, param, grad, states);
    store_param(own, tensor, dtypes, param, launch.options.stochastic_rounding, step);
    if constexpr (kQuantizedStates)
      quantize_states(kIndices, own, tensor, step, scales, states);
    else
      store_states(kIndices, own, tensor, dtypes.state, step, states);
  }
  if (tensor.lowp_out) own.store_floats(dtypes.lowp_out, tensor.lowp_out, param);
  if (launch.options.zero_grads) {
    const OwnFloats zeros = {};
    own.store_floats(dtypes.grad, tensor.grad, zeros);
  }
}

// As many thread blocks per multiprocessor as possible without spilling registers: each warp waits long for its roots
// and quotients.
template <int kStateCount, bool kQuantizedStates>
constexpr int kThreadBlocksPerMultiprocessor = kQuantizedStates && kStateCount <= 2 ? 4 : 3;

// One step for a launch's tensors, one thread block per chunk, one warp per quantization block. `kQuantizedStates` says
// whether the states are.
template <int kStateCount, bool kQuantizedStates>
__global__ void __launch_bounds__(kThreads, kThreadBlocksPerMultiprocessor<kStateCount, kQuantizedStates>)
    blocks_kernel(const __grid_constant__ StepLaunch launch) {
  const bool skipped = launch.found_inf && *launch.found_inf != 0.0f;
  const uint32_t index = tensor_of_block(launch.first_block, launch.count, blockIdx.x);
  const Tensor& tensor = launch.tensors[index];
  const StepScalars& scalars = launch.device_scalars ? launch.device_scalars[launch.rows[index]] : launch.scalars;
  const Constants<CudaOwnOps> k(scalars, true);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x - launch.first_block[index]) * kChunk;
  const int64_t end = chunk + kChunk < tensor.numel ? chunk + kChunk : tensor.numel;
  const bool aligned = is_aligned(tensor);

  for (int64_t block = chunk + threadIdx.x / kWarp * kQuantizationBlock; block < end;
       block += kThreads / kWarp * kQuantizationBlock) {
    const int64_t begin = block + threadIdx.x % kWarp * kElementsPerThread;
    if (aligned && end - block >= kQuantizationBlock)
      update_own<kStateCount, kQuantizedStates>(OwnElements<true>(begin, end), launch, tensor, k, scalars.step, block,
                                                skipped);
    else
      update_own<kStateCount, kQuantizedStates>(OwnElements<false>(begin, end), launch, tensor, k, scalars.step, block,
                                                skipped);
  }
}

}  // namespace adamops
