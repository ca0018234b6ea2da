// How exp_avg and exp_avg_sq are rounded to bfloat16: with noise that fills its range evenly over the steps. Rounded to
// nearest, an average that changes by less than half an ulp would never change: beta2 = 0.999 moves exp_avg_sq by a
// thousandth per step, and bfloat16 values are four to eight thousandths apart. The only place that holds this, used on
// the CPU and on the device; adamops/optim/state/average_rounding.py is the same in pure PyTorch.
//
// All elements have the same noise, that of the first element of a quantized state. The errors of each element cancel
// over the steps by themselves, so the bits need not depend on how elements are split into tensors or shards.
// max_exp_avg_sq is rounded to nearest: a maximum that stays is a bfloat16 already, and noise would raise the others.
//
// Included by code that is compiled for several CPUs, so nothing here has external linkage (cpu/vector_blocks.h says
// why).
#pragma once

#include <cstdint>

#include "formats/quantized_blocks.h"

namespace adamops {
namespace {

// The noise of a step for the average with this Format: 16 bits.
template <class Format>
ADAMOPS_HOST_DEVICE inline uint32_t average_noise(uint32_t step) {
  return noise_of<Format>(0, step);
}

// Returns the rounded bfloat16 in the upper halves; the lower halves are garbage. Adding noise to the bits of a float
// rounds its magnitude, so averages of either sign are too large as often as too small. Infinities stay, since their
// lower halves are zero. So do NaNs with a zero lower half; for other NaNs the caller passes no noise. A nonzero
// average of squares does not become zero, or the next step would divide by eps alone. Bits is an unsigned integer of
// 32 bits, or a vector of them.
template <class Format, class Bits>
ADAMOPS_HOST_DEVICE inline Bits rounded_average(Bits bits, Bits noise) {
  const Bits rounded = bits + noise;
  if constexpr (Format::kSigned) {
    return rounded;
  } else {
    const Bits one = Bits{} + 0x10000u, lower = bits << 16;
    const Bits least = lower < one ? lower : one;  // zero, or one if the lower half is not zero
    return rounded > least ? rounded : least;
  }
}

}  // namespace
}  // namespace adamops
