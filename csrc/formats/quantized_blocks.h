// The 8-bit format of quantized optimizer states: the only place that holds it, used on the CPU and on the device.
// adamops/optim/state/quantization.py is the same in pure PyTorch; docs/low-precision.md compares formats.
//
// A tensor is split, in memory order, into quantization blocks of 256 elements. A quantization block has a scale, a
// bfloat16 not below the largest magnitude in it. Each element is x = scale * expand(q) / expand(largest q), where q is
// its quantized value, an integer. `expand` is nearly a square for exp_avg and nearly a fourth power for exp_avg_sq, so
// that the steps between quantized values shrink with the value, as Adam needs. It consists of shifts: the bits of a
// float, taken as an integer, are a piecewise linear logarithm, and halving a logarithm takes a square root. So no
// element needs a table, a division or a root, and the bits are the same everywhere.
//
// A step rounds with noise that cancels over the steps. Rounded to nearest, an average that changes by less than half a
// quantization step would never change: beta2 = 0.999 moves exp_avg_sq by a thousandth, and its quantized values are
// 1.6 % apart at best.
//
// Included by code that is compiled for several CPUs, so nothing here has external linkage (cpu/vector_blocks.h says
// why).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamops {
namespace {

constexpr int64_t kQuantizationBlock = 256;

// What the quantized values of a state mean: expand(q) has the bits of q * kShrink, shifted left by kPower. The
// factor brings the exponent to where the shift keeps it in range, and zero stays zero.
struct SignedFormat {  // as of exp_avg: -127 to 127, as int8
  static constexpr bool kSigned = true;
  static constexpr int8_t kNotFinite = -128, kMostFinite = 127;
  static constexpr int kPower = 1, kShrinkExponent = 64;
  static constexpr float kShrink = 0x1p-64f, kTopExpanded = 8064.0f, kUnit = 1 / kTopExpanded;
};
struct UnsignedFormat {  // as of exp_avg_sq: 0 to 255, where 0 is for zero alone
  static constexpr bool kSigned = false;
  static constexpr uint8_t kNotFinite = 255, kMostFinite = 254;
  static constexpr int kPower = 2, kShrinkExponent = 96;
  static constexpr float kShrink = 0x1p-96f, kTopExpanded = 528482304.0f, kUnit = 1 / kTopExpanded;
};

// Format::kNotFinite, in the first state, marks an element if one of its states is not finite. The first scale of a
// quantization block with such an element is negative, and no finite element there has that value.
constexpr uint16_t kHasNotFinite = 0x8000;

constexpr int32_t kMagnitudeBits = 0x7FFFFFFF, kInfinity = 0x7F800000;

// The scale of a quantization block, as the bits of a bfloat16, given the bits of its largest magnitude, which is
// finite. It has a thousandth of headroom, so that rounding never exceeds the largest quantized value. No scale is less
// than 2^-90, so that its inverse fits a float, and none is infinite.
constexpr uint16_t kLeastScale = (127 - 90) << 7, kMostScale = 0x7F7F;
ADAMOPS_HOST_DEVICE inline uint16_t block_scale(int32_t largest) {
  const uint32_t scale = (static_cast<uint32_t>(largest) + 0x2000 + 0xFFFF) >> 16;
  return static_cast<uint16_t>(scale < kLeastScale ? kLeastScale : scale > kMostScale ? kMostScale : scale);
}
template <class Ops>
ADAMOPS_HOST_DEVICE inline float scale_in_fp32(uint16_t scale) {
  return Ops::from_bits(static_cast<uint32_t>(scale & ~kHasNotFinite) << 16);
}

// The factor that a state is multiplied by to be quantized. Magnitudes beyond the largest scale, up to the largest
// float, would exceed the largest quantized value. For that scale the factor is therefore 1.2 % less: the inverse of
// the bfloat16 that would come second after kMostScale if infinity did not.
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline float inverse_scale(uint16_t scale) {
  constexpr float kLeast = static_cast<float>(Format::kTopExpanded * 0x1.fcp-129);
  return scale == kMostScale ? kLeast : Ops::div(Format::kTopExpanded, scale_in_fp32<Ops>(scale));
}

// Sixteen pseudo-random bits of noise for each element of a state in a step. They fill their range evenly, over the
// elements as well as over the steps, so that rounding errors cancel within a few steps. (Weyl sequences, whose strides
// over the steps are near the golden ratio and the plastic number.)
template <class Format>
constexpr uint16_t kElementStride = Format::kSigned ? 0x85EB : 0xCA6B;
template <class Format>
ADAMOPS_HOST_DEVICE inline uint16_t noise_of(int64_t index, uint32_t step) {
  constexpr uint32_t kStepStride = Format::kSigned ? 0x9E37 : 0xC13F;
  return static_cast<uint16_t>(static_cast<uint32_t>(index) * kElementStride<Format> + step * kStepStride);
}
// Noise is added as the float 128 + noise / 2^16, whose lowest 16 bits are the noise. The 128 makes the number to be
// rounded positive, so that truncating it rounds down; it is subtracted from the quantized values again.
constexpr int32_t kNoiseBits = 0x43000000, kQuantizedOffset = 128;

// The functions for elements work on single floats or on vectors of them, depending on `Ops`: Number, and Integers of
// 32 bits. Each operation rounds once.

// Bits shifted out are lost. C++ does not define that for single signed integers, so they have an overload.
template <class Integers>
ADAMOPS_HOST_DEVICE inline Integers shifted_left(Integers bits, int by) {
  return bits << by;
}
ADAMOPS_HOST_DEVICE inline int32_t shifted_left(int32_t bits, int by) {
  return static_cast<int32_t>(static_cast<uint32_t>(bits) << by);
}

// `quantized` is an integer; `unit` is scale * Format::kUnit.
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline typename Ops::Number dequantize(typename Ops::Number quantized, typename Ops::Number unit) {
  const auto shrunk = Ops::bits(Ops::mul(quantized, Ops::set(Format::kShrink)));
  const auto magnitude = Ops::mul(Ops::from_bits(shifted_left(shrunk, Format::kPower)), unit);  // without the sign
  if constexpr (Format::kSigned)
    return Ops::from_bits(Ops::bits(magnitude) | (shrunk & ~kMagnitudeBits));
  else
    return magnitude;
}

// Returns the quantized value plus kQuantizedOffset. `inverse` is inverse_scale(); `noise` is kNoiseBits | noise_of(),
// as a float. An unsigned x must not be negative, and the caller raises its quantized value to least_quantized().
template <class Format, class Ops>
ADAMOPS_HOST_DEVICE inline typename Ops::Integers quantize(typename Ops::Number x, typename Ops::Number inverse,
                                                           typename Ops::Number noise) {
  const auto relative = Ops::bits(Ops::mul(x, inverse));
  // Shifting the exponent takes the root, and adding to it divides by Format::kShrink. The arithmetic shift doubles the
  // sign bit; the lower copy is cleared. Zero becomes so small a number that it adds nothing to the noise.
  constexpr int32_t kAllButLowerSign = ~0x40000000, kGrowth = Format::kShrinkExponent << 23;
  auto root = relative >> Format::kPower;
  if constexpr (Format::kSigned) root = root & kAllButLowerSign;
  return Ops::truncated(Ops::add(Ops::from_bits(root + kGrowth), noise));
}
// In unsigned states, quantized zero is for zero alone, or the next step would divide by eps alone. Takes the bits of
// x.
ADAMOPS_HOST_DEVICE inline int32_t least_quantized(int32_t bits) {
  return bits > 0 ? 1 : 0;
}

}  // namespace
}  // namespace adamops
