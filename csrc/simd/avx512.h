// Vector wrapper for AVX-512: 16 floats. Every operation rounds once, in the current (default) rounding mode.
#pragma once

#include <immintrin.h>

#include "formats/half.h"
#include "runtime/cpu_features.h"

namespace adamops {

struct Avx512 {
  using Number = __m512;
  using Doubles = __m256d;  // converting to these takes half the time on Zen 4
  static constexpr int kWidth = 16;
  static constexpr uint32_t kRequires = kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl | kAvx2 | kFma | kF16c;

  static Number set(float x) { return _mm512_set1_ps(x); }
  static Number mul(Number a, Number b) { return _mm512_mul_ps(a, b); }
  static Number fma(Number a, Number b, Number c) { return _mm512_fmadd_ps(a, b, c); }
  static Number div(Number a, Number b) { return _mm512_div_ps(a, b); }
  static Number sqrt(Number a) { return _mm512_sqrt_ps(a); }

  // a > b ? a : b, but NaN if either is NaN. VMAXPS alone then returns b, so a NaN in a is put back.
  static Number max(Number a, Number b) {
    const __mmask16 a_is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), a_is_nan, a);
  }

  // In double, the square of a float is exact, so sum + x * x rounds once, with or without an FMA.
  static Doubles load_doubles(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Doubles add_square(Doubles sum, Doubles x) { return _mm256_fmadd_pd(x, x, sum); }
  static Number load(const float* from) { return _mm512_loadu_ps(from); }
  static Number load(const fp16* from) { return _mm512_cvtph_ps(halves(from)); }

  static void store(float* to, Number a) { _mm512_storeu_ps(to, a); }
  static void store(fp16* to, Number a) { store_halves(to, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

  // Two vectors in memory order.
  static void load_two(const bf16* from, Number& a, Number& b) {
    a = widened(halves(from));
    b = widened(halves(from + kWidth));
  }
  // Rounding increments an upper half if its lower half is above half an ulp, or is half an ulp and the last bit of the
  // upper half is set. Nothing is added to the largest NaN, which would become zero.
  static void store_two(bf16* to, Number a, Number b) {
    const __m512i lower_halves = _mm512_setr_epi32(  // of all lanes, first a's, then b's
        0x020000, 0x060004, 0x0A0008, 0x0E000C, 0x120010, 0x160014, 0x1A0018, 0x1E001C,  //
        0x220020, 0x260024, 0x2A0028, 0x2E002C, 0x320030, 0x360034, 0x3A0038, 0x3E003C);
    const __m512i upper_halves = _mm512_add_epi16(lower_halves, _mm512_set1_epi16(1));
    const __m512i a_bits = _mm512_castps_si512(a), b_bits = _mm512_castps_si512(b);
    const __m512i upper = _mm512_permutex2var_epi16(a_bits, upper_halves, b_bits);
    const __m512i lower = _mm512_permutex2var_epi16(a_bits, lower_halves, b_bits);
    const __m512i headroom = _mm512_andnot_si512(upper, _mm512_set1_epi16(0x7FFF));  // 0 in the largest NaN
    const __m512i last_is_clear = _mm512_and_si512(headroom, _mm512_set1_epi16(1));
    const __m512i carry = _mm512_srli_epi16(_mm512_subs_epu16(lower, last_is_clear), 15);
    _mm512_storeu_si512(to, _mm512_add_epi16(upper, _mm512_min_epu16(carry, headroom)));
  }

  static Number load_even(const bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(from), 16));
  }
  static Number load_odd(const bf16* from) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(from), _mm512_set1_epi32(-0x10000)));
  }
  // Only for results of arithmetic on bf16 values: a NaN among them has a zero lower half, so no carry can change it.
  static void store_even_odd(bf16* to, Number even, Number odd) {
    const __m512i low = _mm512_srli_epi32(add_half_ulp(_mm512_castps_si512(even)), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAA, low, add_half_ulp(_mm512_castps_si512(odd))));
  }

  // Stores upper halves as they are: of two vectors in memory order, or of the even and the odd elements.
  static void store_two_upper(bf16* to, Number a, Number b) {
    const __m512i upper_halves = _mm512_setr_epi32(  // of all lanes, first a's, then b's
        0x030001, 0x070005, 0x0B0009, 0x0F000D, 0x130011, 0x170015, 0x1B0019, 0x1F001D,  //
        0x230021, 0x270025, 0x2B0029, 0x2F002D, 0x330031, 0x370035, 0x3B0039, 0x3F003D);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(_mm512_castps_si512(a), upper_halves, _mm512_castps_si512(b)));
  }
  static void store_even_odd_upper(bf16* to, Number even, Number odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAA, low, _mm512_castps_si512(odd)));
  }

  // Loads bytes as integers. Stores take four vectors of integers that are 128 more than the bytes.
  using ByteSource = __m512i;
  static __m512i load_bytes(const int8_t* from) { return _mm512_cvtepi8_epi32(bytes(from)); }
  static __m512i load_bytes(const uint8_t* from) { return _mm512_cvtepu8_epi32(bytes(from)); }
  static void store_bytes(int8_t* to, const __m512i (&a)[4]) {
    store_in_order(to, _mm512_packs_epi16(words(a[0], a[1]), words(a[2], a[3])));
  }
  static void store_bytes(uint8_t* to, const __m512i (&a)[4]) {
    store_in_order(to, _mm512_packus_epi16(words(a[0], a[1]), words(a[2], a[3])));
  }

 private:
  // Carries into the upper half of each lane as rounding to nearest even requires; the upper half is then the bf16.
  // (Not VCVTNEPS2BF16, which flushes subnormals.) The addend is 0x7FFF plus the last kept bit. Subtracting its
  // negative, ~(0x7FFE | last kept bit), takes one instruction less.
  static __m512i add_half_ulp(__m512i bits) {
    const __m512i one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7FFE);
    constexpr int kNotOfAAndBOrC = 0x15;  // the truth table of ~((a & b) | c)
    return _mm512_sub_epi32(bits, _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 16), one, most, kNotOfAAndBOrC));
  }

  static Number widened(__m256i bf16s) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16s), 16));
  }

  static __m512i words(__m512i a, __m512i b) {
    return _mm512_sub_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(128));
  }
  // Packing works within 128-bit lanes, so each holds a quarter of each of the four vectors.
  static void store_in_order(void* to, __m512i packed) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, packed));
  }

  static __m128i bytes(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static __m256i halves(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void store_halves(void* to, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
};

using Ops = Avx512;

}  // namespace adamops
