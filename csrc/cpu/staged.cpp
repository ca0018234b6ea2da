// The staged CPU kernel, for everything without a loop of its own in cpu/direct.cpp: quantized states, other
// combinations of dtypes, split master weights, stochastic rounding, 16-bit copies of the param. Widens one
// quantization block at a time to fp32, updates it and writes it back. Each stage is a loop over memory that stays in
// the L1 cache, so that features can be combined without compiling each combination. Compiled once per SIMD target;
// cpu/vector_blocks.h says what that means for linkage.
#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include <cstring>

#include "cpu/average_pairs.h"
#include "cpu/rule_loops.h"
#include "cpu/vector_blocks.h"
#include "formats/float_bits.h"
#include "formats/quantized_blocks.h"
#include "formats/split_masters.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

static_assert(kQuantizationBlock % kVectorBlock == 0, "blocks, and so pairs of vectors, fill quantization blocks");
static_assert(kQuantizationBlock % (4 * Ops::kWidth) == 0, "quantized values are stored by four vectors");
static_assert(kQuantizedOffset == 128, "store_bytes takes it off");

// Single floats, for loops that the compiler vectorizes.
struct FloatOps {
  static float mul(float a, float b) { return a * b; }
  static float add(float a, float b) { return a + b; }
  static float div(float a, float b) { return a / b; }
  static uint32_t bits(float a) { return bits_of(a); }
  static float from_bits(uint32_t bits) { return float_of(bits); }
};

// Vectors, with integers of the same width: the vector extensions of GCC and Clang, whose operators become the target's
// instructions.
struct VectorOps : Ops {
  typedef int32_t Integers __attribute__((vector_size(4 * kWidth)));
  typedef uint16_t Halves __attribute__((vector_size(4 * kWidth)));
  typedef float Floats __attribute__((vector_size(4 * kWidth)));

  template <class To, class From>
  static To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }
  static Number add(Number a, Number b) { return cast<Number>(cast<Floats>(a) + cast<Floats>(b)); }
  // Adds the 16-bit halves separately.
  static Integers add_halves(Integers a, Integers b) { return cast<Integers>(cast<Halves>(a) + cast<Halves>(b)); }
  static Integers bits(Number a) { return cast<Integers>(a); }
  static Number from_bits(Integers a) { return cast<Number>(a); }
  static Number to_number(Integers a) { return cast<Number>(__builtin_convertvector(a, Floats)); }
  static Integers truncated(Number a) { return __builtin_convertvector(cast<Floats>(a), Integers); }
  static Integers set_integers(int32_t a) { return Integers{} + a; }
  static Integers smaller(Integers a, Integers b) { return a < b ? a : b; }

  template <class Byte>
  static Integers load_bytes(const Byte* from) {
    return cast<Integers>(Ops::load_bytes(from));
  }
  template <class Byte>
  static void store_bytes(Byte* to, const Integers (&a)[4]) {
    const ByteSource four[4] = {cast<ByteSource>(a[0]), cast<ByteSource>(a[1]), cast<ByteSource>(a[2]),
                                cast<ByteSource>(a[3])};
    Ops::store_bytes(to, four);
  }
};
using Integers = VectorOps::Integers;
using Number = Ops::Number;

// Vectors of unsigned integers, for magnitudes: the bits of floats without the sign. (Unsigned, so that negative NaN is
// beyond infinity too.)
template <int kLanes>
struct Magnitudes {
  typedef uint32_t Vector __attribute__((vector_size(4 * kLanes)));

  static Vector larger(Vector a, Vector b) { return a > b ? a : b; }
  static uint32_t largest_of(Vector a) {
    if constexpr (kLanes <= 2) {
      uint32_t lanes[kLanes];
      std::memcpy(lanes, &a, sizeof a);
      return lanes[0] > lanes[kLanes - 1] ? lanes[0] : lanes[kLanes - 1];
    } else {
      using Half = Magnitudes<kLanes / 2>;
      typename Half::Vector halves[2];
      std::memcpy(halves, &a, sizeof a);
      return Half::largest_of(Half::larger(halves[0], halves[1]));
    }
  }
};
using VectorMagnitudes = Magnitudes<Ops::kWidth>;

// A quantization block of a column in memory. If the tensor ends within it, a zero-padded copy.
template <class T>
class PaddedBlock {
 public:
  PaddedBlock(void* column, int64_t begin, int64_t count) : memory_(at<T>(column, begin)), count_(count) {
    if (count == kQuantizationBlock) return;
    std::memset(static_cast<void*>(copy_), 0, sizeof copy_);
    std::memcpy(static_cast<void*>(copy_), memory_, static_cast<size_t>(count) * sizeof(T));
  }
  T* begin() { return count_ == kQuantizationBlock ? memory_ : copy_; }
  void write_back() const {
    if (count_ != kQuantizationBlock)
      std::memcpy(static_cast<void*>(memory_), copy_, static_cast<size_t>(count_) * sizeof(T));
  }

 private:
  T* memory_;
  int64_t count_;
  T copy_[kQuantizationBlock];
};

template <class T>
inline void widen(const T* from, float* to) {
  for (int64_t i = 0; i < kQuantizationBlock; i += Pair::kElements) store_pair(to + i, load_pair(from + i));
}
template <class T>
inline void narrow(const float* from, T* to) {
  for (int64_t i = 0; i < kQuantizationBlock; i += Pair::kElements) store_pair(to + i, load_pair(from + i));
}

// Quantized states ---------------------------------------------------------------------------------------------------

// Dequantizes one vector at a time.
template <class Format>
class Dequantizer {
 public:
  Dequantizer(const Byte<Format>* quantized, uint16_t scale)
      : quantized_(quantized), unit_(Ops::set(scale_in_fp32<FloatOps>(scale) * Format::kUnit)) {}
  Number load(int64_t i) const {
    return dequantize<Format, VectorOps>(VectorOps::to_number(VectorOps::load_bytes(quantized_ + i)), unit_);
  }

 private:
  const Byte<Format>* quantized_;
  Number unit_;
};

// Quantizes one quantization block of a state. Constructed ahead of its use, because the scale's inverse takes a
// division.
template <class Format>
class Quantizer {
 public:
  Quantizer(uint32_t largest, int64_t index, uint32_t step)
      : scale_(block_scale(static_cast<int32_t>(largest))),
        inverse_(Ops::set(inverse_scale<Format, FloatOps>(scale_))),
        noise_(VectorOps::add_halves(noise_of_lanes(), VectorOps::set_integers(noise_of<Format>(index, step)))) {}

  uint16_t scale() const { return scale_; }

  void quantize_block(const float* __restrict from, Byte<Format>* __restrict quantized) const {
    const Integers stride = VectorOps::set_integers(static_cast<uint16_t>(Ops::kWidth * kElementStride<Format>));
    Integers noise = noise_, least = VectorOps::set_integers(kInfinity);
    for (int64_t i = 0; i < kQuantizationBlock; i += 4 * Ops::kWidth) {
      Integers four[4];
      for (int64_t j = 0; j < 4; ++j, noise = VectorOps::add_halves(noise, stride)) {
        four[j] =
            quantize<Format, VectorOps>(Ops::load(from + i + j * Ops::kWidth), inverse_, VectorOps::from_bits(noise));
        if (!Format::kSigned) least = VectorOps::smaller(least, four[j]);
      }
      VectorOps::store_bytes(quantized + i, four);
    }
    const auto most_below_zero = VectorOps::cast<VectorMagnitudes::Vector>(-least);
    if (!Format::kSigned && VectorMagnitudes::largest_of(most_below_zero) == uint32_t{0} - kQuantizedOffset)  // rare
      for (int64_t i = 0; i < kQuantizationBlock; ++i)
        if (quantized[i] == 0)
          quantized[i] = static_cast<Byte<Format>>(least_quantized(static_cast<int32_t>(FloatOps::bits(from[i]))));
  }

 private:
  static Integers noise_of_lanes() {  // a constant
    Integers lanes;
    for (int i = 0; i < Ops::kWidth; ++i)
      lanes[i] = kNoiseBits | static_cast<uint16_t>(static_cast<uint32_t>(i) * kElementStride<Format>);
    return lanes;
  }

  uint16_t scale_;
  Number inverse_;
  Integers noise_;
};

// Params and their master weights ------------------------------------------------------------------------------------

struct Random {
  bool used;
  uint32_t key, index;  // the index of the quantization block's first element
  uint32_t bits(int64_t i) const { return random_bits(key, index + static_cast<uint32_t>(i)); }
};

template <class Integer>
inline void join(const bf16* param, const Integer* remainder, float* to) {
  for (int64_t i = 0; i < kQuantizationBlock; ++i)
    to[i] = FloatOps::from_bits(Bf16Remainder<8 * sizeof(Integer)>::join(param[i].bits, remainder[i]));
}
template <class Integer>
inline void join(const fp16* param, const Integer* remainder, float* to) {
  widen(param, to);
  for (int64_t i = 0; i < kQuantizationBlock; ++i)
    to[i] = Fp16Remainder<8 * sizeof(Integer), FloatOps>::join(to[i], remainder[i]);
}

template <class Integer>
inline void split(const float* from, const Random& random, bf16* param, Integer* remainder) {
  using Remainder = Bf16Remainder<8 * sizeof(Integer)>;
  const auto run = [&](const auto& noise) {
    for (int64_t i = 0; i < kQuantizationBlock; ++i) {
      uint32_t upper;
      int32_t lower;
      Remainder::split(FloatOps::bits(from[i]), noise(i), upper, lower);
      param[i].bits = static_cast<uint16_t>(upper);
      remainder[i] = static_cast<Integer>(lower);
    }
  };
  if (random.used)
    run([&](int64_t i) { return random.bits(i); });
  else
    run([](int64_t) { return Remainder::kHalf; });
}
template <class Integer>
inline void split(const float* from, const Random& random, fp16* param, Integer* remainder) {
  using Remainder = Fp16Remainder<8 * sizeof(Integer), FloatOps>;
  float rounded[kQuantizationBlock];
  narrow(from, param);
  widen(param, rounded);
  const auto run = [&](const auto& noise) {
    for (int64_t i = 0; i < kQuantizationBlock; ++i) {
      const int next = Remainder::overflows(from[i], rounded[i], noise(i)) ? 1 : 0;
      param[i].bits = static_cast<uint16_t>(param[i].bits + (param[i].bits & 0x8000 ? -next : next));
    }
    widen(param, rounded);
    for (int64_t i = 0; i < kQuantizationBlock; ++i)
      remainder[i] = static_cast<Integer>(Remainder::of(from[i], rounded[i], noise(i)));
  };
  if (random.used && sizeof(Integer) == 1)
    run([&](int64_t i) { return static_cast<float>(static_cast<int32_t>(random.bits(i) & 0xFFFF)) * 0x1p-16f; });
  else
    run([](int64_t) { return 0.5f; });
}

inline void narrow_at_random(const float* from, const Random& random, bf16* to) {
  for (int64_t i = 0; i < kQuantizationBlock; ++i)
    to[i].bits = static_cast<uint16_t>(stochastic_bf16(FloatOps::bits(from[i]), random.bits(i)) >> 16);
}
inline void narrow_at_random(const float* from, const Random& random, fp16* to) {
  float rounded[kQuantizationBlock];
  for (int64_t i = 0; i < kQuantizationBlock; ++i)
    rounded[i] = FloatOps::from_bits(stochastic_fp16<FloatOps>(FloatOps::bits(from[i]), random.bits(i)));
  narrow(rounded, to);
}
inline void narrow_at_random(const float* from, const Random&, float* to) {
  narrow(from, to);
}

// A quantization block -----------------------------------------------------------------------------------------------

// Scratch in fp32 for what is updated.
struct Scratch {
  alignas(kCacheLine) float param[kQuantizationBlock], grad[kQuantizationBlock],
      states[kMostStates][kQuantizationBlock];
};

// A quantization block of a tensor: `count` elements from `begin` on. Widens columns to fp32 and writes them back.
struct BlockOfTensor {
  const Tensor& tensor;
  const Work& work;
  int64_t begin, count;

  // Runs visit(T*) on the quantization block of a column of T, and writes it back if `Written`.
  template <bool Written, class T, class Visit>
  void visit_as(void* column, const Visit& visit) const {
    PaddedBlock<T> block(column, begin, count);
    visit(block.begin());
    if (Written) block.write_back();
  }
  template <bool Written, class Visit>
  void visit_floats(Dtype dtype, void* column, const Visit& visit) const {
    if (dtype == kFloat32) return visit_as<Written, float>(column, visit);
    if (dtype == kBfloat16) return visit_as<Written, bf16>(column, visit);
    visit_as<Written, fp16>(column, visit);
  }
  // Runs visit(param, remainder) on a param and its remainder.
  template <bool Written, class Visit>
  void visit_param_and_remainder(const Visit& visit) const {
    const auto with_rest = [&](auto* param) {
      if (work.dtypes.master == kRemainder8)
        visit_as<Written, int8_t>(tensor.master, [&](int8_t* remainder) { visit(param, remainder); });
      else
        visit_as<Written, int16_t>(tensor.master, [&](int16_t* remainder) { visit(param, remainder); });
    };
    if (work.dtypes.param == kBfloat16) return visit_as<Written, bf16>(tensor.param, with_rest);
    visit_as<Written, fp16>(tensor.param, with_rest);
  }

  bool in_place(Dtype dtype) const { return dtype == kFloat32 && count == kQuantizationBlock; }

  template <class T>
  void prefetch(const void* column) const {
    prefetch_block<kQuantizationBlock>(at<T>(column, begin), work.prefetch_bytes);
  }

  // A column in fp32: in place, or widened into the scratch.
  float* take(Dtype dtype, void* column, float* scratch) const {
    dtype == kFloat32 ? prefetch<float>(column) : prefetch<bf16>(column);
    if (in_place(dtype)) return at<float>(column, begin);
    visit_floats<false>(dtype, column, [&](auto* from) { widen(from, scratch); });
    return scratch;
  }
  void put(Dtype dtype, void* column, const float* from) const {
    if (!in_place(dtype)) visit_floats<true>(dtype, column, [&](auto* to) { narrow(from, to); });
  }
  template <int kIndex>
  ADAMOPS_INLINE void put_state(const float* from) const {
    void* const column = tensor.states[kIndex];
    if (work.dtypes.state != kBfloat16 || Rule::kStates[kIndex].rounding == kNearest)
      return put(work.dtypes.state, column, from);
    const AverageRounding rounding(work.scalars.step);
    visit_as<true, bf16>(column, [&](bf16* to) {
      for (int64_t i = 0; i < kQuantizationBlock; i += Pair::kElements)
        rounding.template store_state<kIndex, false>(to + i, load_pair(from + i));
    });
  }

  float* take_param(float* scratch) const {
    if (work.dtypes.master == kNoMaster) return take(work.dtypes.param, tensor.param, scratch);
    if (work.dtypes.master == kMasterFp32) return take(kFloat32, tensor.master, scratch);
    prefetch<bf16>(tensor.param);
    work.dtypes.master == kRemainder8 ? prefetch<uint8_t>(tensor.master) : prefetch<bf16>(tensor.master);
    visit_param_and_remainder<false>(
        [&](const auto* param, const auto* remainder) { join(param, remainder, scratch); });
    return scratch;
  }
  void put_param(const float* from) const {
    const auto index = static_cast<uint64_t>(begin);
    const Random random = {work.options.stochastic_rounding,
                           random_key(tensor.rng_offset, work.scalars.step, static_cast<uint32_t>(index >> 32)),
                           static_cast<uint32_t>(index)};
    if (work.dtypes.master == kRemainder8 || work.dtypes.master == kRemainder16) {
      visit_param_and_remainder<true>([&](auto* param, auto* remainder) { split(from, random, param, remainder); });
    } else {
      if (work.dtypes.master == kMasterFp32) put(kFloat32, tensor.master, from);
      if (random.used && work.dtypes.master == kNoMaster && work.dtypes.param != kFloat32)
        visit_floats<true>(work.dtypes.param, tensor.param, [&](auto* to) { narrow_at_random(from, random, to); });
      else
        put(work.dtypes.param, tensor.param, from);
    }
    if (tensor.lowp_out) visit_floats<true>(work.dtypes.lowp_out, tensor.lowp_out, [&](auto* to) { narrow(from, to); });
  }

  void zero_grad() const {
    const int64_t size = size_of(work.dtypes.grad);
    std::memset(at<char>(tensor.grad, begin * size), 0, static_cast<size_t>(count * size));
  }
};

// States as floats.
template <int kStateCount>
struct FloatStates : PerState<float*, kStateCount> {
  static constexpr bool kQuantizedStates = false;

  template <int kIndex>
  ADAMOPS_INLINE Number load(int64_t i) const {
    return Ops::load(of_state<kIndex>(*this) + i);
  }
};

// The largest magnitudes of the states of a quantization block, which set its scales. Collected during the update.
template <int kStateCount>
struct Largest : PerState<VectorMagnitudes::Vector, kStateCount> {
  template <int kIndex>
  ADAMOPS_INLINE void note(Number state) {
    auto& largest = of_state<kIndex>(*this);
    Integers bits = VectorOps::bits(state);
    if constexpr (FormatOf<kIndex>::kSigned) bits = bits & kMagnitudeBits;
    largest = VectorMagnitudes::larger(largest, VectorOps::cast<VectorMagnitudes::Vector>(bits));
  }
};

// Updates a quantization block. Loads states from `from`, stores them as floats to `to`, and returns their largest
// magnitudes if they are quantized. While the divider works on a param, the states of the next elements are updated; on
// its own, a CPU does not look that far ahead.
template <int kMode, class States, int... kIndex>
inline Largest<sizeof...(kIndex)> update(IndexList<kIndex...>, const Constants<Ops>& k, float* param, const float* grad,
                                         const States& from, const FloatStates<sizeof...(kIndex)>& to) {
  constexpr int kStateCount = sizeof...(kIndex);
  Largest<kStateCount> largest = {};
  Rule::Started<Ops> started;  // for the elements whose param is still to be updated
  const auto start = [&](int64_t i) {
    Number states[kMostStates] = {from.template load<kIndex>(i)...};
    const Number p = Rule::reads_param(kMode) ? Ops::load(param + i) : Number{};
    started = Rule::start<kStateCount, Ops>(k.rule, kMode, p, k.scaled(Ops::load(grad + i)), states);
    (Ops::store(of_state<kIndex>(to) + i, states[kIndex]), ...);
    if constexpr (States::kQuantizedStates) (largest.template note<kIndex>(states[kIndex]), ...);
  };
  start(0);
  for (int64_t i = 0; i < kQuantizationBlock; i += Ops::kWidth) {
    const Rule::Started<Ops> started_here = started;
    if (i + Ops::kWidth < kQuantizationBlock) start(i + Ops::kWidth);
    Number p = Ops::load(param + i);
    Rule::finish<Ops>(k.rule, p, started_here);
    Ops::store(param + i, p);
  }
  return largest;
}

template <int kMode, int... kIndex>
inline void update_float_states(IndexList<kIndex...> indices, const Constants<Ops>& k, const BlockOfTensor& block,
                                float* param, const float* grad, Scratch& scratch) {
  [[maybe_unused]] const Dtype dtype = block.work.dtypes.state;
  const FloatStates<sizeof...(kIndex)> states = {
      {{block.take(dtype, block.tensor.states[kIndex], scratch.states[kIndex])}...}};
  update<kMode>(indices, k, param, grad, states, states);
  (block.template put_state<kIndex>(of_state<kIndex>(states)), ...);
}

// One T<format> for each state, where T is a class template.
template <template <class> class T, class List>
struct FormatMembers;
template <template <class> class T, int... kIndex>
struct FormatMembers<T, IndexList<kIndex...>> : StateMember<kIndex, T<FormatOf<kIndex>>>... {};

template <class Format>
using PaddedBytes = PaddedBlock<Byte<Format>>;

// Quantized states, dequantized vector by vector.
template <class List>
struct DequantizedStates : FormatMembers<Dequantizer, List> {
  static constexpr bool kQuantizedStates = true;

  template <int kIndex>
  ADAMOPS_INLINE Number load(int64_t i) const {
    return of_state<kIndex>(*this).load(i);
  }
};

// The same for the few quantization blocks with elements that are not finite: the first state, which marks them, has
// been dequantized before.
template <class List>
struct DequantizedStatesWithNan : DequantizedStates<List> {
  const float* first;

  template <int kIndex>
  ADAMOPS_INLINE Number load(int64_t i) const {
    if constexpr (kIndex == 0)
      return Ops::load(first + i);
    else
      return DequantizedStates<List>::template load<kIndex>(i);
  }
};

template <class Format>
inline void dequantize_with_nan(const Byte<Format>* quantized, const Dequantizer<Format>& dequantizer, float* to) {
  for (int64_t i = 0; i < kQuantizationBlock; i += Ops::kWidth) Ops::store(to + i, dequantizer.load(i));
  for (int64_t i = 0; i < kQuantizationBlock; ++i)
    if (quantized[i] == Format::kNotFinite) to[i] = FloatOps::from_bits(0x7FC00000);
}

// Quantizes the states of a quantization block, which begins with the element at `index` of the tensor.
template <int... kIndex>
inline void quantize_states(IndexList<kIndex...>, const FloatStates<sizeof...(kIndex)>& from,
                            const Largest<sizeof...(kIndex)>& largest, int64_t index, uint32_t step,
                            FormatMembers<PaddedBytes, IndexList<kIndex...>>& quantized, uint16_t* scales) {
  uint32_t most[] = {VectorMagnitudes::largest_of(of_state<kIndex>(largest))...};
  bool not_finite[kQuantizationBlock];
  const bool all_finite = ((most[kIndex] < kInfinity) && ...);
  if (!all_finite) {
    const auto magnitude = [](float x) { return FloatOps::bits(x) & kMagnitudeBits; };
    const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
    ((most[kIndex] = 0), ...);
    for (int64_t i = 0; i < kQuantizationBlock; ++i) {
      not_finite[i] = ((magnitude(of_state<kIndex>(from)[i]) >= kInfinity) || ...);
      if (not_finite[i]) ((of_state<kIndex>(from)[i] = 0.0f), ...);
      ((most[kIndex] = larger(most[kIndex], magnitude(of_state<kIndex>(from)[i]))), ...);
    }
  }
  const FormatMembers<Quantizer, IndexList<kIndex...>> quantizers = {{{most[kIndex], index, step}}...};
  (of_state<kIndex>(quantizers).quantize_block(of_state<kIndex>(from), of_state<kIndex>(quantized).begin()), ...);
  ((scales[kIndex] = of_state<kIndex>(quantizers).scale()), ...);
  if (!all_finite) {
    using First = FormatOf<0>;
    Byte<First>* const first = of_state<0>(quantized).begin();
    scales[0] |= kHasNotFinite;
    for (int64_t i = 0; i < kQuantizationBlock; ++i) {
      if (not_finite[i])
        first[i] = First::kNotFinite;
      else if (!First::kSigned && first[i] == First::kNotFinite)
        first[i] = First::kMostFinite;
    }
  }
}

template <int kMode, int... kIndex>
inline void update_quantized_states(IndexList<kIndex...> indices, const Constants<Ops>& k, const BlockOfTensor& block,
                                    float* param, const float* grad, Scratch& scratch) {
  using List = IndexList<kIndex...>;
  (block.prefetch<uint8_t>(block.tensor.states[kIndex]), ...);
  FormatMembers<PaddedBytes, List> bytes = {{{block.tensor.states[kIndex], block.begin, block.count}}...};
  uint16_t* const scales = block.tensor.scales + block.begin / kQuantizationBlock * int64_t{sizeof...(kIndex)};
  const DequantizedStates<List> dequantized = {{{{of_state<kIndex>(bytes).begin(), scales[kIndex]}}...}};
  const FloatStates<sizeof...(kIndex)> states = {{{scratch.states[kIndex]}...}};
  Largest<sizeof...(kIndex)> largest;
  if (scales[0] & kHasNotFinite) {
    dequantize_with_nan(of_state<0>(bytes).begin(), of_state<0>(dequantized), scratch.states[0]);
    const DequantizedStatesWithNan<List> with_nan = {{dequantized}, scratch.states[0]};
    largest = update<kMode>(indices, k, param, grad, with_nan, states);
  } else {
    largest = update<kMode>(indices, k, param, grad, dequantized, states);
  }
  quantize_states(indices, states, largest, block.begin, block.work.scalars.step, bytes, scales);
  (of_state<kIndex>(bytes).write_back(), ...);
}

struct StagedVariants {
  template <int kMode, int kStateCount>
  static void range(const Tensor& tensor, const Work& work, int64_t begin, int64_t end) {
    constexpr Indices<kStateCount> kIndices;
    const Constants<Ops> k(work.scalars);
    Scratch scratch;
    for (int64_t i = begin; i < end; i += kQuantizationBlock) {
      const BlockOfTensor block = {tensor, work, i, end - i < kQuantizationBlock ? end - i : kQuantizationBlock};
      float* const param = block.take_param(scratch.param);
      const float* const grad = block.take(work.dtypes.grad, tensor.grad, scratch.grad);
      update_states<kMode>(kIndices, k, block, param, grad, scratch);
      block.put_param(param);
      if (work.options.zero_grads) block.zero_grad();
    }
  }

 private:
  template <int kMode, int... kIndex>
  static void update_states(IndexList<kIndex...> indices, const Constants<Ops>& k, const BlockOfTensor& block,
                            float* param, const float* grad, Scratch& scratch) {
    if constexpr (sizeof...(kIndex) != 0)
      if (block.work.dtypes.state == kQuantized)
        return update_quantized_states<kMode>(indices, k, block, param, grad, scratch);
    update_float_states<kMode>(indices, k, block, param, grad, scratch);
  }
};

}  // namespace

StepRange choose_staged_range(Dtypes dtypes, StepOptions options) {
  return is_supported(dtypes) ? choose_variant<StagedVariants>(options) : nullptr;
}

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
