// How an average of the grads, or of their squares, is rounded to bfloat16: with noise that fills its range evenly over
// the steps. To the nearest, one that changes by less than half of its last place never would: beta2 = 0.999 moves
// exp_avg_sq by a thousandth a step, and bfloat16 values are four to eight thousandths apart. The only place that holds
// this, used on the CPU and on the device; the same in pure PyTorch is adamops/ops/adam/average_rounding.py.
//
// The noise is that of 8-bit codes for the first element, and all elements have it: each element's errors make up for
// one another over the steps by themselves, and so the bits depend on no cut of the elements into tensors or shards.
// max_exp_avg_sq is rounded to the nearest: a maximum that stays is a bfloat16 already, and noise would raise the
// others.
//
// Included by code that is compiled for several CPUs, so nothing here has external linkage (simd/blocks.h says why).
#pragma once

#include <cstdint>

#include "quantized_blocks.h"

namespace adamops {
namespace {

// The noise of a step for the average that Format is of: 16 bits.
template <class Format>
ADAMOPS_HOST_DEVICE inline uint32_t average_noise(uint32_t step) {
  return noise_of<Format>(0, step);
}

// The rounded bfloat16 in the upper halves, anything in the lower ones. Adding noise to the bits of a float rounds its
// magnitude, so averages of either sign are as often too large as too small. Infinities stay, as their lower halves are
// empty; so do such NaNs, and for others the caller has no noise. An average of squares that is not zero does not
// become zero, or the next step would divide by nothing but eps. Bits are an unsigned integer of 32 bits, or a vector
// of them.
template <class Format, class Bits>
ADAMOPS_HOST_DEVICE inline Bits rounded_average(Bits bits, Bits noise) {
  const Bits rounded = bits + noise;
  if constexpr (Format::kSigned) {
    return rounded;
  } else {
    const Bits one = Bits{} + 0x10000u, lower = bits << 16;
    const Bits least = lower < one ? lower : one;  // zero, or one if there is a lower half
    return rounded > least ? rounded : least;
  }
}

}  // namespace
}  // namespace adamops
