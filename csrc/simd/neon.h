// Vector wrapper for NEON as every AArch64 CPU has it: 4 floats. Every operation rounds once, in the current (default)
// rounding mode.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "formats/half.h"
#include "runtime/cpu_features.h"

namespace adamops {

struct Neon {
  using Number = float32x4_t;
  using Doubles = float64x2_t;
  static constexpr int kWidth = 4;
  static constexpr uint32_t kRequires = kNoFeatures;

  static Number set(float x) { return vdupq_n_f32(x); }
  static Number mul(Number a, Number b) { return vmulq_f32(a, b); }
  static Number fma(Number a, Number b, Number c) { return vfmaq_f32(c, a, b); }
  static Number div(Number a, Number b) { return vdivq_f32(a, b); }
  static Number sqrt(Number a) { return vsqrtq_f32(a); }
  // a > b ? a : b, but NaN if either is NaN. FMAX would prefer +0 to -0, which the rule does not.
  static Number max(Number a, Number b) { return vbslq_f32(vorrq_u32(vcgtq_f32(a, b), is_nan(a)), a, b); }

  // In double, the square of a float is exact, so sum + x * x rounds once, with or without an FMA.
  static Doubles load_doubles(const float* from) { return vcvt_f64_f32(vld1_f32(from)); }
  static Doubles add_square(Doubles sum, Doubles x) { return vfmaq_f64(sum, x, x); }
  static Number load(const float* from) { return vld1q_f32(from); }
  static Number load(const fp16* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits))); }

  static void store(float* to, Number a) { vst1q_f32(to, a); }
  static void store(fp16* to, Number a) { vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(a))); }

  // Two vectors in memory order.
  static void load_two(const bf16* from, Number& a, Number& b) {
    const uint16x8_t halves = vld1q_u16(&from->bits);
    a = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16));
    b = vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16));
  }
  static void store_two(bf16* to, Number a, Number b) {
    vst1q_u16(&to->bits, vshrn_high_n_u32(vshrn_n_u32(rounded_to_bf16(a), 16), rounded_to_bf16(b), 16));
  }

  static Number load_even(const bf16* from) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs(from), 16)); }
  static Number load_odd(const bf16* from) {
    return vreinterpretq_f32_u32(vandq_u32(pairs(from), vdupq_n_u32(0xFFFF0000u)));
  }
  // Only for results of arithmetic on bf16 values: a NaN among them has a zero lower half, so no carry can change it.
  static void store_even_odd(bf16* to, Number even, Number odd) {
    const uint32x4_t low = add_half_ulp(vreinterpretq_u32_f32(even));
    const uint32x4_t high = add_half_ulp(vreinterpretq_u32_f32(odd));
    vst1q_u16(&to->bits, vreinterpretq_u16_u32(vsriq_n_u32(high, low, 16)));  // high's upper halves, low's below them
  }

  // Stores upper halves as they are: of two vectors in memory order, or of the even and the odd elements.
  static void store_two_upper(bf16* to, Number a, Number b) {
    vst1q_u16(&to->bits, vuzp2q_u16(vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b)));
  }
  static void store_even_odd_upper(bf16* to, Number even, Number odd) {
    vst1q_u16(&to->bits, vtrn2q_u16(vreinterpretq_u16_f32(even), vreinterpretq_u16_f32(odd)));
  }

  // Loads bytes as integers. Stores take four vectors of integers that are 128 more than the bytes.
  using ByteSource = int32x4_t;
  static int32x4_t load_bytes(const int8_t* from) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(four_bytes(from)))));
  }
  static int32x4_t load_bytes(const uint8_t* from) {
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(four_bytes(from))))));
  }
  static void store_bytes(int8_t* to, const int32x4_t (&a)[4]) {
    const int16x8_t first = vcombine_s16(vmovn_s32(a[0]), vmovn_s32(a[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(a[2]), vmovn_s32(a[3]));
    vst1q_s8(to, veorq_s8(vcombine_s8(vmovn_s16(first), vmovn_s16(second)), vdupq_n_s8(-128)));
  }
  static void store_bytes(uint8_t* to, const int32x4_t (&a)[4]) { store_bytes(reinterpret_cast<int8_t*>(to), a); }

 private:
  static uint32x2_t four_bytes(const void* from) {
    uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return vdup_n_u32(four);
  }
  static uint32x4_t is_nan(Number a) { return vmvnq_u32(vceqq_f32(a, a)); }

  // Carries into the upper half of each lane as rounding to nearest even requires; the upper half is then the bf16.
  static uint32x4_t add_half_ulp(uint32x4_t bits) {
    const uint32x4_t last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(last, vdupq_n_u32(0x7FFF)));
  }

  // The same for any number. NaN is left as it is: the carry could turn it into infinity. (Arithmetic returns only
  // quiet NaNs, whose upper half is a NaN by itself.)
  static uint32x4_t rounded_to_bf16(Number a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a);
    return vbslq_u32(is_nan(a), bits, add_half_ulp(bits));
  }

  static uint32x4_t pairs(const bf16* from) { return vreinterpretq_u32_u16(vld1q_u16(&from->bits)); }
};

using Ops = Neon;

}  // namespace adamops
