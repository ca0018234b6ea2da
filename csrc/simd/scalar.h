// "Vector" wrapper of one float in plain C++: the baseline for architectures without a wrapper of their own.
#pragma once

#include <cmath>

#include "formats/float_bits.h"
#include "formats/half.h"
#include "runtime/cpu_features.h"

namespace adamops {

struct Scalar {
  using Number = float;
  using Doubles = double;
  static constexpr int kWidth = 1;
  static constexpr uint32_t kRequires = kNoFeatures;

  static Number set(float x) { return x; }
  static Number mul(Number a, Number b) { return a * b; }
  static Number fma(Number a, Number b, Number c) { return std::fma(a, b, c); }
  static Number div(Number a, Number b) { return a / b; }
  static Number sqrt(Number a) { return std::sqrt(a); }
  // a > b ? a : b, but NaN if either is NaN.
  static Number max(Number a, Number b) { return a > b || a != a ? a : b; }

  // In double, the square of a float is exact, so sum + x * x rounds once, with or without an FMA.
  static Doubles load_doubles(const float* from) { return *from; }
  static Doubles add_square(Doubles sum, Doubles x) { return sum + x * x; }
  static Number load(const float* from) { return *from; }
  static Number load(const fp16* from) {
    const uint32_t magnitude = (from->bits & 0x7FFFu) << 13, sign = (from->bits & 0x8000u) << 16;
    const uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | scaled | (magnitude >= 0x7C00u << 13 ? 0x7F800000u : 0u));
  }

  static void store(float* to, Number a) { *to = a; }
  // Three ranges of |a|, as in sse2.h: subnormal halves, normal halves, infinity and NaN.
  static void store(fp16* to, Number a) {
    const uint32_t bits = bits_of(a), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude >= 0x477FF000u) {
      half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    } else if (magnitude < (127u - 14u) << 23) {
      half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    } else {
      half = (magnitude - ((127u - 15u) << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
  }

  static void load_two(const bf16* from, Number& a, Number& b) {
    a = load_even(from);
    b = load_odd(from);
  }
  static void store_two(bf16* to, Number a, Number b) { store_even_odd(to, a, b); }

  static Number load_even(const bf16* from) { return float_of(uint32_t{from->bits} << 16); }
  static Number load_odd(const bf16* from) { return load_even(from + 1); }
  static void store_even_odd(bf16* to, Number even, Number odd) {
    to[0].bits = rounded_to_bf16(even);
    to[1].bits = rounded_to_bf16(odd);
  }

  // Stores upper halves as they are: of two vectors in memory order, or of the even and the odd elements.
  static void store_two_upper(bf16* to, Number a, Number b) { store_even_odd_upper(to, a, b); }
  static void store_even_odd_upper(bf16* to, Number even, Number odd) {
    to[0].bits = static_cast<uint16_t>(bits_of(even) >> 16);
    to[1].bits = static_cast<uint16_t>(bits_of(odd) >> 16);
  }

  // Loads bytes as integers. Stores take four vectors of integers that are 128 more than the bytes.
  using ByteSource = int32_t;
  static int32_t load_bytes(const int8_t* from) { return *from; }
  static int32_t load_bytes(const uint8_t* from) { return *from; }
  static void store_bytes(int8_t* to, const int32_t (&a)[4]) {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<int8_t>(a[i] - 128);
  }
  static void store_bytes(uint8_t* to, const int32_t (&a)[4]) {
    for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(a[i] - 128);
  }

 private:
  static uint16_t rounded_to_bf16(Number a) {
    const uint32_t bits = bits_of(a);
    const uint32_t rounded = a != a ? bits | 0x400000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
    return static_cast<uint16_t>(rounded >> 16);
  }
};

using Ops = Scalar;

}  // namespace adamops
