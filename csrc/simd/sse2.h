// Vector wrapper for the x86-64 baseline, SSE2: 4 floats. SSE2 lacks FMA, half conversions and blends; they are
// emulated here, bit-identical to the instructions of later CPUs.
#pragma once

#include <emmintrin.h>

#include <cstring>

#include "formats/half.h"
#include "runtime/cpu_features.h"

namespace adamops {

struct Sse2 {
  using Number = __m128;
  using Doubles = __m128d;
  static constexpr int kWidth = 4;
  static constexpr uint32_t kRequires = kNoFeatures;

  static Number set(float x) { return _mm_set1_ps(x); }
  static Number mul(Number a, Number b) { return _mm_mul_ps(a, b); }
  static Number div(Number a, Number b) { return _mm_div_ps(a, b); }
  static Number sqrt(Number a) { return _mm_sqrt_ps(a); }

  static Number fma(Number a, Number b, Number c) {
    const __m128 low = _mm_cvtpd_ps(fma_to_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c)));
    const __m128 high =
        _mm_cvtpd_ps(fma_to_odd(_mm_cvtps_pd(upper(a)), _mm_cvtps_pd(upper(b)), _mm_cvtps_pd(upper(c))));
    return _mm_movelh_ps(low, high);
  }

  // a > b ? a : b, but NaN if either is NaN. MAXPS alone then returns b, so a NaN in a is put back.
  static Number max(Number a, Number b) {
    const __m128 a_is_nan = _mm_cmpunord_ps(a, a);
    return _mm_or_ps(_mm_andnot_ps(a_is_nan, _mm_max_ps(a, b)), _mm_and_ps(a_is_nan, a));
  }

  // In double, the square of a float is exact, so sum + x * x rounds once, with or without an FMA.
  static Doubles load_doubles(const float* from) { return _mm_cvtps_pd(_mm_castsi128_ps(halves(from))); }
  static Doubles add_square(Doubles sum, Doubles x) { return _mm_add_pd(sum, _mm_mul_pd(x, x)); }
  static Number load(const float* from) { return _mm_loadu_ps(from); }
  // The exponent and mantissa bits of a half, moved to the place of a float's, are the half's value times 2^-112.
  // Multiplying by 2^112 is exact, even for subnormals. The exponent bits of infinity and NaN must then be completed.
  static Number load(const fp16* from) {
    const __m128i bits = _mm_unpacklo_epi16(halves(from), _mm_setzero_si128());
    const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(bits, _mm_set1_epi32(0x7FFF)), 13);
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(bits, _mm_set1_epi32(0x8000)), 16);
    const __m128 scaled = _mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_castsi128_ps(_mm_set1_epi32((127 + 112) << 23)));
    const __m128i not_finite = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7BFF << 13));
    const __m128i completed =
        _mm_or_si128(_mm_castps_si128(scaled), _mm_and_si128(not_finite, _mm_set1_epi32(0x7F800000)));
    return _mm_castsi128_ps(_mm_or_si128(completed, sign));
  }

  static void store(float* to, Number a) { _mm_storeu_ps(to, a); }
  // Three ranges of |a|. Up to 2^-14, adding 0.5 leaves the half's subnormal bits at the bottom of the sum, rounded by
  // the adder. Up to 65520, the exponent is rebiased and 13 bits are rounded off. Beyond that, infinity or NaN.
  static void store(fp16* to, Number a) {
    const __m128i bits = _mm_castps_si128(a);
    const __m128i sign = _mm_and_si128(bits, _mm_set1_epi32(INT32_MIN));
    const __m128i magnitude = _mm_xor_si128(bits, sign);
    const __m128 half_ulp_holder = _mm_set1_ps(0.5f);
    const __m128i small = _mm_sub_epi32(_mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(magnitude), half_ulp_holder)),
                                        _mm_castps_si128(half_ulp_holder));
    const __m128i last = _mm_and_si128(_mm_srli_epi32(magnitude, 13), _mm_set1_epi32(1));
    const __m128i rebias = _mm_set1_epi32((15 - 127) * (1 << 23) + 0xFFF);
    const __m128i normal = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(magnitude, rebias), last), 13);
    const __m128i is_nan = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x7F800000));
    const __m128i large = _mm_or_si128(_mm_set1_epi32(0x7C00), _mm_and_si128(is_nan, _mm_set1_epi32(0x0200)));

    const __m128i is_small = _mm_cmplt_epi32(magnitude, _mm_set1_epi32((127 - 14) << 23));
    const __m128i is_large = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x477FEFFF));  // 65520 and above
    const __m128i finite = select(is_small, small, normal);
    store_halves(to, _mm_or_si128(select(is_large, large, finite), _mm_srai_epi32(sign, 16)));
  }

  // Two vectors in memory order.
  static void load_two(const bf16* from, Number& a, Number& b) {
    a = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), pairs(from)));
    b = _mm_castsi128_ps(_mm_unpackhi_epi16(_mm_setzero_si128(), pairs(from)));
  }
  static void store_two(bf16* to, Number a, Number b) {
    const __m128i upper_halves =  // as signed integers, which packing keeps
        _mm_packs_epi32(_mm_srai_epi32(rounded_to_bf16(a), 16), _mm_srai_epi32(rounded_to_bf16(b), 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), upper_halves);
  }

  static Number load_even(const bf16* from) { return _mm_castsi128_ps(_mm_slli_epi32(pairs(from), 16)); }
  static Number load_odd(const bf16* from) {
    return _mm_castsi128_ps(_mm_and_si128(pairs(from), _mm_set1_epi32(-0x10000)));
  }
  static void store_even_odd(bf16* to, Number even, Number odd) {
    const __m128i low = _mm_srli_epi32(rounded_to_bf16(even), 16);
    const __m128i high = _mm_and_si128(rounded_to_bf16(odd), _mm_set1_epi32(-0x10000));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_or_si128(low, high));
  }

  // Stores upper halves as they are: of two vectors in memory order, or of the even and the odd elements.
  static void store_two_upper(bf16* to, Number a, Number b) {
    const __m128i upper_halves =  // as signed integers, which packing keeps
        _mm_packs_epi32(_mm_srai_epi32(_mm_castps_si128(a), 16), _mm_srai_epi32(_mm_castps_si128(b), 16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), upper_halves);
  }
  static void store_even_odd_upper(bf16* to, Number even, Number odd) {
    const __m128i low = _mm_srli_epi32(_mm_castps_si128(even), 16);
    const __m128i high = _mm_and_si128(_mm_castps_si128(odd), _mm_set1_epi32(-0x10000));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_or_si128(low, high));
  }

  // Loads bytes as integers. Stores take four vectors of integers that are 128 more than the bytes.
  using ByteSource = __m128i;
  static __m128i load_bytes(const int8_t* from) { return _mm_srai_epi32(upper_bytes(from), 24); }
  static __m128i load_bytes(const uint8_t* from) { return _mm_srli_epi32(upper_bytes(from), 24); }
  static void store_bytes(int8_t* to, const __m128i (&a)[4]) {
    const __m128i packed = _mm_packs_epi16(words(a[0], a[1]), words(a[2], a[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  static void store_bytes(uint8_t* to, const __m128i (&a)[4]) {
    const __m128i packed = _mm_packus_epi16(words(a[0], a[1]), words(a[2], a[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }

 private:
  // The bf16 nearest to a, ties to even, in the upper halves; the lower halves are garbage. Adding 0x7FFF plus the last
  // kept bit carries into the upper half as the rounding requires. Nothing is added to NaN: the carry could turn it
  // into infinity. (Arithmetic returns only quiet NaNs, whose upper half is a NaN too.)
  static __m128i rounded_to_bf16(Number a) {
    const __m128i bits = _mm_castps_si128(a);
    const __m128i last = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i half_ulp = _mm_add_epi32(last, _mm_set1_epi32(0x7FFF));
    return _mm_add_epi32(bits, _mm_and_si128(half_ulp, _mm_castps_si128(_mm_cmpord_ps(a, a))));
  }

  static __m128i pairs(const bf16* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
  // a * b + c of two floats each, in double, rounded to odd: the product is exact (24 + 24 bits), and the sum is
  // rounded towards zero, with its last bit set if anything was lost. Rounding this value to float equals rounding the
  // exact value once, since a double has more than two bits beyond a float (Boldo & Melquiond, 2008, "Emulation of a
  // FMA and correctly rounded sums"). `lost` is the exact error of the sum (Knuth's TwoSum); neither it nor lost * sum
  // leaves the range of double.
  static __m128d fma_to_odd(__m128d a, __m128d b, __m128d c) {
    const __m128d product = _mm_mul_pd(a, b);
    const __m128d sum = _mm_add_pd(product, c);
    const __m128d part = _mm_sub_pd(sum, product);
    const __m128d lost = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, part)), _mm_sub_pd(c, part));
    const __m128d zero = _mm_setzero_pd();
    const __m128d too_large = _mm_cmplt_pd(_mm_mul_pd(lost, sum), zero);
    // NaN in `lost` comes from infinities and NaNs, which need no rounding: ordered comparisons are false for it.
    const __m128d inexact = _mm_or_pd(_mm_cmplt_pd(lost, zero), _mm_cmpgt_pd(lost, zero));
    const __m128i truncated = _mm_add_epi64(_mm_castpd_si128(sum), _mm_castpd_si128(too_large));  // a mask is -1
    return _mm_castsi128_pd(_mm_or_si128(truncated, _mm_srli_epi64(_mm_castpd_si128(inexact), 63)));
  }

  static __m128 upper(__m128 a) { return _mm_movehl_ps(a, a); }
  static __m128i select(__m128i mask, __m128i yes, __m128i no) {
    return _mm_or_si128(_mm_and_si128(mask, yes), _mm_andnot_si128(mask, no));
  }
  static __m128i words(__m128i a, __m128i b) { return _mm_sub_epi16(_mm_packs_epi32(a, b), _mm_set1_epi16(128)); }
  // Four bytes, each in the top byte of its lane.
  static __m128i upper_bytes(const void* from) {
    int four;
    std::memcpy(&four, from, sizeof four);
    const __m128i zero = _mm_setzero_si128();
    return _mm_unpacklo_epi16(zero, _mm_unpacklo_epi8(zero, _mm_cvtsi32_si128(four)));
  }
  static __m128i halves(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
  // Keeps the low 16 bits of each lane. PACKSSDW saturates, so the lanes are sign-extended from 16 bits first.
  static void store_halves(void* to, __m128i a) {
    const __m128i extended = _mm_srai_epi32(_mm_slli_epi32(a, 16), 16);
    _mm_storel_epi64(static_cast<__m128i*>(to), _mm_packs_epi32(extended, extended));
  }
};

using Ops = Sse2;

}  // namespace adamops
