// The 8-bit codes of the optimizer's states: the only place that holds them, used on the CPU and on the device. The
// same in pure PyTorch is adamops/ops/adam/quantization.py; what else was measured is in docs/low-precision.md.
//
// A tensor is cut, in the order of its memory, into blocks of 256 elements. A block has a scale, a bfloat16 not below
// the largest magnitude in it, and each element is x = scale * expand(code) / expand(top code). `expand` is nearly a
// square for the average of the grads, and nearly a fourth power for that of their squares, so that the steps between
// codes shrink with the value as Adam needs it; but it is made of shifts: the bits of a float, taken as an integer, are
// a piecewise linear logarithm, and halving a logarithm takes a root. So there is neither a table nor a division or a
// root for each element, and the bits are the same everywhere.
//
// A step rounds with noise that makes up for itself over the steps. To the nearest, an average that changes by less
// than half a step of its code would never change: beta2 = 0.999 moves exp_avg_sq by a thousandth, and its codes
// are 1.6 % apart at best.
//
// Included by code that is compiled for several CPUs, so nothing here has external linkage (simd/blocks.h says why).
#pragma once

#include <cstdint>

#include "adam_update.h"

namespace adamops {
namespace {

constexpr int64_t kQuantizationBlock = 256;

// What the codes of a state mean: expand(code) has the bits of code * 2^-kShrink shifted left by kPower. The factor
// brings the exponent to where the shift leaves it in range, and zero stays zero.
struct SignedFormat {  // of exp_avg: -127 to 127, as int8
  static constexpr bool kSigned = true;
  static constexpr int kPower = 1, kShrinkExponent = 64;
  static constexpr float kShrink = 0x1p-64f, kTopExpanded = 8064.0f, kUnit = 1 / kTopExpanded;
};
struct UnsignedFormat {  // of exp_avg_sq: 0 to 255, and 0 is for zero alone
  static constexpr bool kSigned = false;
  static constexpr int kPower = 2, kShrinkExponent = 96;
  static constexpr float kShrink = 0x1p-96f, kTopExpanded = 528482304.0f, kUnit = 1 / kTopExpanded;
};

// Stands in exp_avg for an element of which a state is not finite. A block that has one has a negative scale there.
constexpr int8_t kNotFinite = -128;
constexpr uint16_t kHasNotFinite = 0x8000;

constexpr int32_t kMagnitudeBits = 0x7FFFFFFF, kInfinity = 0x7F800000;

// The scale of a block, as the bits of a bfloat16, given the bits of its largest magnitude, which is finite. There is
// room for a thousandth more, so that rounding never gets beyond the top code. No scale is less than 2^-90, so that its
// inverse fits a float, and none is infinite.
constexpr uint16_t kLeastScale = (127 - 90) << 7, kMostScale = 0x7F7F;
ADAMOPS_HOST_DEVICE inline uint16_t block_scale(int32_t largest) {
  const uint32_t scale = (static_cast<uint32_t>(largest) + 0x2000 + 0xFFFF) >> 16;
  return static_cast<uint16_t>(scale < kLeastScale ? kLeastScale : scale > kMostScale ? kMostScale : scale);
}
template <class Ops>
ADAMOPS_HOST_DEVICE inline float scale_in_fp32(uint16_t scale) {
  return Ops::from_bits(static_cast<uint32_t>(scale & ~kHasNotFinite) << 16);
}

// What a state is multiplied by to be quantized. Magnitudes beyond the largest scale, up to that of the largest float,
// would get beyond the top code: there it is 1.2 % less, the inverse of the bfloat16 that would come second after
// kMostScale if infinity did not.
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline float inverse_scale(uint16_t scale) {
  constexpr float kLeast = static_cast<float>(Format::kTopExpanded * 0x1.fcp-129);
  return scale == kMostScale ? kLeast : Ops::div(Format::kTopExpanded, scale_in_fp32<Ops>(scale));
}

// Sixteen random-looking bits of noise for each element of a state in a step. Over the elements as over the steps they
// fill their range evenly (sequences of Weyl, whose strides over the steps are near the golden ratio and the plastic
// number), so that what is rounded off is made up for within a few steps.
template <class Format>
constexpr uint16_t kElementStride = Format::kSigned ? 0x85EB : 0xCA6B;
template <class Format>
ADAMOPS_HOST_DEVICE inline uint16_t noise_of(int64_t index, uint32_t step) {
  constexpr uint32_t kStepStride = Format::kSigned ? 0x9E37 : 0xC13F;
  return static_cast<uint16_t>(static_cast<uint32_t>(index) * kElementStride<Format> + step * kStepStride);
}
// Noise is added as the float 128 + noise / 2^16, whose lowest 16 bits are the noise. The 128 make what is rounded
// positive, so that to truncate it is to round down, and are taken off the codes.
constexpr int32_t kNoiseBits = 0x43000000, kQuantizedOffset = 128;

// The functions for elements are for floats one by one or for vectors of them, as `Ops` has it: Number and Integers of
// 32 bits, each operation rounded once.

// What is shifted out is lost, which for single integers with a sign is not for C++ to say.
template <class Integers>
ADAMOPS_HOST_DEVICE inline Integers shifted_left(Integers bits, int by) {
  return bits << by;
}
ADAMOPS_HOST_DEVICE inline int32_t shifted_left(int32_t bits, int by) {
  return static_cast<int32_t>(static_cast<uint32_t>(bits) << by);
}

// `code` is a whole number; `unit` is scale * Format::kUnit.
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline typename Ops::Number dequantize(typename Ops::Number code, typename Ops::Number unit) {
  const auto shrunk = Ops::bits(Ops::mul(code, Ops::set(Format::kShrink)));
  const auto magnitude = Ops::mul(Ops::from_bits(shifted_left(shrunk, Format::kPower)), unit);  // without the sign
  if constexpr (Format::kSigned)
    return Ops::from_bits(Ops::bits(magnitude) | (shrunk & ~kMagnitudeBits));
  else
    return magnitude;
}

// Returns the code plus kQuantizedOffset. `inverse` is inverse_scale(); `noise` is kNoiseBits | noise_of(), as a
// number. An unsigned x must not be negative, and the caller raises its code to least_code().
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline typename Ops::Integers quantize(typename Ops::Number x, typename Ops::Number inverse,
                                                           typename Ops::Number noise) {
  const auto relative = Ops::bits(Ops::mul(x, inverse));
  // The root, by shifting the exponent, and divided by Format::kShrink, by adding to it. The arithmetic shift doubles
  // the sign, of which the lower one goes. Zero becomes so small a number that it adds nothing to the noise.
  constexpr int32_t kAllButLowerSign = ~0x40000000, kGrowth = Format::kShrinkExponent << 23;
  auto root = relative >> Format::kPower;
  if constexpr (Format::kSigned) root = root & kAllButLowerSign;
  return Ops::truncated(Ops::add(Ops::from_bits(root + kGrowth), noise));
}
// The unsigned code zero is for zero alone, or the next step would divide by nothing but eps. Given the bits of x.
ADAMOPS_HOST_DEVICE inline int32_t least_code(int32_t bits) {
  return bits > 0 ? 1 : 0;
}

}  // namespace
}  // namespace adamops
