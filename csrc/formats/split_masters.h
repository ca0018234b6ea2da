// How a 16-bit param keeps what fp32 would: with the bits that it lacks in a remainder (split master weights), or by
// stochastic rounding. The only place that holds this, used on the CPU and on the device.
//
// Included by code that is compiled for several CPUs, so nothing here has external linkage (cpu/vector_blocks.h says
// why).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamops {
namespace {

// A bijection of 32-bit integers whose outputs look random (constants from C. Wellons' search for low bias,
// "Prospecting for Hash Functions", 2018).
ADAMOPS_HOST_DEVICE inline uint32_t mixed_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x *= 0xD35A2D97u;
  return x ^ (x >> 15);
}

// The key of the random bits of a tensor in a step. `rng_offset` is that of the tensor; `block` counts 2^32 elements.
ADAMOPS_HOST_DEVICE inline uint32_t random_key(uint32_t rng_offset, uint32_t step, uint32_t block) {
  return mixed_bits(mixed_bits(rng_offset + 0x9E3779B9u * step) + block);
}

// 32 random bits for an element, which depend only on the key and the element's index in the tensor.
ADAMOPS_HOST_DEVICE inline uint32_t random_bits(uint32_t key, uint32_t index) {
  return mixed_bits(index ^ key);
}

constexpr uint32_t kExponentBits = 0x7F800000;

ADAMOPS_HOST_DEVICE inline bool is_nan_bits(uint32_t bits) {
  return (bits & 0x7FFFFFFFu) > kExponentBits;
}
ADAMOPS_HOST_DEVICE inline bool is_finite_bits(uint32_t bits) {
  return (bits & kExponentBits) != kExponentBits;
}

// A split master weight of 16 + Bits bits, the upper bits of a float: a bfloat16 param and a remainder of `Bits` bits.
// The param is the bfloat16 nearest to the master, in a tie the one away from zero. What is left fits a signed integer:
// master = param * 2^Bits + remainder, all as integers. With a remainder of 16 bits the master is the float itself.
template <int Bits>
struct Bf16Remainder {
  // `noise` of 16 - Bits random bits rounds a float to a master stochastically; half of their range rounds to nearest.
  static constexpr uint32_t kNoiseMask = (1u << (16 - Bits)) - 1, kHalf = (kNoiseMask + 1) / 2;

  ADAMOPS_HOST_DEVICE static void split(uint32_t bits, uint32_t noise, uint32_t& param, int32_t& remainder) {
    const uint32_t quiet = is_nan_bits(bits) ? 0x7FC00000u : bits + (is_finite_bits(bits) ? noise & kNoiseMask : 0);
    const uint32_t master = quiet >> (16 - Bits);
    param = (master + (1u << (Bits - 1))) >> Bits;
    remainder = static_cast<int32_t>(master - (param << Bits));
  }
  ADAMOPS_HOST_DEVICE static uint32_t join(uint32_t param, int32_t remainder) {
    return (param << 16) + (static_cast<uint32_t>(remainder) << (16 - Bits));
  }
};

// A float16 param and a remainder of `Bits` bits: master = param + remainder * ulp(param) * 2^-Bits. With 16 bits,
// every float between 2^-17 and the largest float16 is kept exactly; below that, multiples of 2^-40 are.
template <int Bits, class Ops>
struct Fp16Remainder {
  static constexpr float kMost = static_cast<float>(1 << (Bits - 1));

  // ulp(param) * 2^-Bits as the bits of a float, given the bits of the param as a float.
  ADAMOPS_HOST_DEVICE static uint32_t unit(uint32_t param) {
    const uint32_t exponent = param & kExponentBits, least = (127u - 14u) << 23;
    return (exponent < least ? least : exponent) - ((10u + Bits) << 23);
  }
  // How far a master lies above a param, in those units. `noise` is in [0, 1); 0.5 rounds to nearest.
  ADAMOPS_HOST_DEVICE static float units(float master, float param, float noise) {
    const float inverse = Ops::from_bits(((127u + 127u) << 23) - unit(Ops::bits(param)));
    return Ops::add(Ops::mul(Ops::add(master, -param), inverse), noise);
  }
  // Whether the remainder of a master that was rounded to `param` is one more than fits, which is half an ulp of the
  // param. The next larger param must be taken then.
  ADAMOPS_HOST_DEVICE static bool overflows(float master, float param, float noise) {
    return units(master, param, noise) >= kMost;
  }
  ADAMOPS_HOST_DEVICE static int32_t of(float master, float param, float noise) {
    // Truncating a non-negative number rounds down. For a param of infinity or NaN the result is one of the bounds, no
    // matter which.
    const float shifted = Ops::add(units(master, param, noise), kMost);
    const float bounded = shifted > 0.0f ? shifted : 0.0f;
    const int32_t whole = static_cast<int32_t>(bounded < 2 * kMost - 1 ? bounded : 2 * kMost - 1);
    return whole - (1 << (Bits - 1));
  }
  ADAMOPS_HOST_DEVICE static float join(float param, int32_t remainder) {
    return Ops::add(param, Ops::mul(static_cast<float>(remainder), Ops::from_bits(unit(Ops::bits(param)))));
  }
};

// Rounds a float stochastically to one of the two nearest bfloat16 values; returns the bits of that value as a float.
ADAMOPS_HOST_DEVICE inline uint32_t stochastic_bf16(uint32_t bits, uint32_t random) {
  if (is_nan_bits(bits)) return 0x7FC00000u;
  return (bits + (is_finite_bits(bits) ? random & 0xFFFFu : 0)) & 0xFFFF0000u;
}

// The same for float16. Beyond its largest value, 65504, the neighbour is infinity, as in rounding to nearest.
template <class Ops>
ADAMOPS_HOST_DEVICE inline uint32_t stochastic_fp16(uint32_t bits, uint32_t random) {
  const uint32_t sign = bits & 0x80000000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + (is_finite_bits(bits) ? random & 0x1FFFu : 0)) & ~uint32_t{0x1FFF};
  // Subnormal float16: multiples of 2^-24.
  constexpr uint32_t kLeastNormal = (127u - 14u) << 23;
  const float small = Ops::mul(Ops::from_bits(magnitude < kLeastNormal ? magnitude : kLeastNormal), 0x1p24f);
  const float noise = Ops::mul(static_cast<float>(static_cast<int32_t>(random & 0x1FFFu)), 0x1p-13f);
  const float whole = static_cast<float>(static_cast<int32_t>(Ops::add(small, noise)));
  const uint32_t subnormal = Ops::bits(Ops::mul(whole, 0x1p-24f));
  // Masks, since GCC does not vectorize conditionals here.
  const uint32_t is_normal = 0u - static_cast<uint32_t>(magnitude >= kLeastNormal);
  const uint32_t is_number = 0u - static_cast<uint32_t>(!is_nan_bits(bits));
  const uint32_t rounded = sign | (normal & is_normal) | (subnormal & ~is_normal);
  return (rounded & is_number) | (0x7FC00000u & ~is_number);
}

}  // namespace
}  // namespace adamops
