// Vector wrapper for AVX2 with FMA and F16C: 8 floats. Every operation rounds once, in the current (default) rounding
// mode.
#pragma once

#include <immintrin.h>

#include "formats/half.h"
#include "runtime/cpu_features.h"

namespace adamops {

struct Avx2 {
  using Number = __m256;
  using Doubles = __m256d;
  static constexpr int kWidth = 8;
  static constexpr uint32_t kRequires = kAvx2 | kFma | kF16c;

  static Number set(float x) { return _mm256_set1_ps(x); }
  static Number mul(Number a, Number b) { return _mm256_mul_ps(a, b); }
  static Number fma(Number a, Number b, Number c) { return _mm256_fmadd_ps(a, b, c); }
  static Number div(Number a, Number b) { return _mm256_div_ps(a, b); }
  static Number sqrt(Number a) { return _mm256_sqrt_ps(a); }

  // a > b ? a : b, but NaN if either is NaN. VMAXPS alone then returns b, so a NaN in a is put back.
  static Number max(Number a, Number b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }

  // In double, the square of a float is exact, so sum + x * x rounds once, with or without an FMA.
  static Doubles load_doubles(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static Doubles add_square(Doubles sum, Doubles x) { return _mm256_fmadd_pd(x, x, sum); }
  static Number load(const float* from) { return _mm256_loadu_ps(from); }
  static Number load(const fp16* from) { return _mm256_cvtph_ps(halves(from)); }

  static void store(float* to, Number a) { _mm256_storeu_ps(to, a); }
  static void store(fp16* to, Number a) { store_halves(to, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }

  // Two vectors in memory order. Packing and unpacking work within 128-bit lanes, so the middle quarters are swapped
  // before or after.
  static void load_two(const bf16* from, Number& a, Number& b) {
    const __m256i upper = _mm256_permute4x64_epi64(pairs(from), kSwapMiddle), lower = _mm256_setzero_si256();
    a = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower, upper));
    b = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower, upper));
  }
  static void store_two(bf16* to, Number a, Number b) {
    const __m256i a_bits = _mm256_castps_si256(a), b_bits = _mm256_castps_si256(b), zero = _mm256_setzero_si256();
    const __m256i upper = _mm256_packus_epi32(_mm256_srli_epi32(a_bits, 16), _mm256_srli_epi32(b_bits, 16));
    const __m256i lower =
        _mm256_packus_epi32(_mm256_blend_epi16(a_bits, zero, 0xAA), _mm256_blend_epi16(b_bits, zero, 0xAA));
    const __m256i headroom = _mm256_andnot_si256(upper, _mm256_set1_epi16(0x7FFF));  // 0 in the largest NaN
    const __m256i up = _mm256_min_epu16(carry(lower, _mm256_and_si256(headroom, _mm256_set1_epi16(1))), headroom);
    store_words(to, _mm256_permute4x64_epi64(_mm256_add_epi16(upper, up), kSwapMiddle));
  }

  static Number load_even(const bf16* from) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs(from), 16)); }
  static Number load_odd(const bf16* from) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs(from), _mm256_set1_epi32(-0x10000)));
  }
  // Only for results of arithmetic on bf16 values: a NaN among them has a zero lower half, which carries nothing.
  static void store_even_odd(bf16* to, Number even, Number odd) {
    const __m256i even_bits = _mm256_castps_si256(even), odd_bits = _mm256_castps_si256(odd);
    const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even_bits, 16), odd_bits, 0xAA);
    const __m256i lower = _mm256_blend_epi16(even_bits, _mm256_slli_epi32(odd_bits, 16), 0xAA);
    store_words(to, _mm256_add_epi16(upper, carry(lower, _mm256_andnot_si256(upper, _mm256_set1_epi16(1)))));
  }

  // Stores upper halves as they are: of two vectors in memory order, or of the even and the odd elements.
  static void store_two_upper(bf16* to, Number a, Number b) {
    const __m256i a_bits = _mm256_castps_si256(a), b_bits = _mm256_castps_si256(b);
    const __m256i upper = _mm256_packus_epi32(_mm256_srli_epi32(a_bits, 16), _mm256_srli_epi32(b_bits, 16));
    store_words(to, _mm256_permute4x64_epi64(upper, kSwapMiddle));
  }
  static void store_even_odd_upper(bf16* to, Number even, Number odd) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(even), 16);
    store_words(to, _mm256_blend_epi16(low, _mm256_castps_si256(odd), 0xAA));
  }

  // Loads bytes as integers. Stores take four vectors of integers that are 128 more than the bytes.
  using ByteSource = __m256i;
  static __m256i load_bytes(const int8_t* from) { return _mm256_cvtepi8_epi32(bytes(from)); }
  static __m256i load_bytes(const uint8_t* from) { return _mm256_cvtepu8_epi32(bytes(from)); }
  static void store_bytes(int8_t* to, const __m256i (&a)[4]) {
    store_in_order(to, _mm256_packs_epi16(words(a[0], a[1]), words(a[2], a[3])));
  }
  static void store_bytes(uint8_t* to, const __m256i (&a)[4]) {
    store_in_order(to, _mm256_packus_epi16(words(a[0], a[1]), words(a[2], a[3])));
  }

 private:
  static constexpr int kSwapMiddle = 0b11011000;  // the second and the third quarter

  // Rounding to bf16 increments an upper half if its lower half is above half an ulp, or is half an ulp and the last
  // bit of the upper half is set.
  static __m256i carry(__m256i lower, __m256i last_is_clear) {
    return _mm256_srli_epi16(_mm256_subs_epu16(lower, last_is_clear), 15);
  }

  static __m256i words(__m256i a, __m256i b) {
    return _mm256_sub_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(128));
  }
  // Packing works within 128-bit lanes, so each holds a quarter of each of the four vectors.
  static void store_in_order(void* to, __m256i packed) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(packed, order));
  }

  static __m256i pairs(const bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store_words(bf16* to, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }
  static __m128i bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
  static __m128i halves(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  static void store_halves(void* to, __m128i a) { _mm_storeu_si128(static_cast<__m128i*>(to), a); }
};

using Ops = Avx2;

}  // namespace adamops
