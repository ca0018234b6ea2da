// Stores moving averages in pairs of vectors: formats/average_rounding.h for the loops of the CPU. Included by kernels,
// which are compiled once per SIMD target, after ADAMOPS_SIMD_HEADER; cpu/vector_blocks.h says what that means for
// linkage.
#pragma once

#include <cstring>

#include "cpu/vector_blocks.h"
#include "formats/average_rounding.h"
#include "state_format.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

// The noise of a step for averages of each sign.
class AverageRounding {
 public:
  explicit AverageRounding(uint32_t step)
      : signed_noise_(Bits{} + average_noise<SignedFormat>(step)),
        unsigned_noise_(Bits{} + average_noise<UnsignedFormat>(step)) {}

  // Stores the state of this index as the rule says. Average or not: to nearest in dtypes other than bfloat16.
  template <int kIndex, bool EvenOdd, class T>
  ADAMOPS_INLINE void store_state(T* to, const Pair& from) const {
    using Format = FormatOf<kIndex>;
    if constexpr (!same_type<T, bf16> || Rule::kStates[kIndex].rounding == kNearest)
      store_pair<EvenOdd>(to, from);
    else if constexpr (EvenOdd)  // all inputs are bfloat16: a NaN among them has a zero lower half
      Ops::store_even_odd_upper(to, rounded<Format>(from.a, noise<Format>()), rounded<Format>(from.b, noise<Format>()));
    else
      Ops::store_two_upper(to, rounded<Format>(from.a, noise_but_of_nan<Format>(from.a)),
                           rounded<Format>(from.b, noise_but_of_nan<Format>(from.b)));
  }

 private:
  using Number = Ops::Number;
  typedef uint32_t Bits __attribute__((vector_size(4 * Ops::kWidth)));
  typedef float Floats __attribute__((vector_size(4 * Ops::kWidth)));

  template <class To, class From>
  ADAMOPS_INLINE static To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "only the type changes");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
  }
  template <class Format>
  ADAMOPS_INLINE Bits noise() const {
    return Format::kSigned ? signed_noise_ : unsigned_noise_;
  }
  template <class Format>
  ADAMOPS_INLINE Bits noise_but_of_nan(Number of) const {
    const Floats floats = cast<Floats>(of);
    return noise<Format>() & cast<Bits>(floats == floats);
  }
  template <class Format>
  ADAMOPS_INLINE static Number rounded(Number a, Bits noise) {
    return cast<Number>(rounded_average<Format>(cast<Bits>(a), noise));
  }

  Bits signed_noise_, unsigned_noise_;
};

}  // namespace
}  // namespace ADAMOPS_TARGET
}  // namespace adamops
