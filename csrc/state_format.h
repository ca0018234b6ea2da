// The 8-bit format of each state of the rule, which its noise when it is rounded to bfloat16 follows too. Included by
// code that is compiled for several CPUs, so nothing here has external linkage (cpu/vector_blocks.h says why).
#pragma once

#include <type_traits>

#include "formats/quantized_blocks.h"
#include "rules/selected.h"

namespace adamops {
namespace {

template <int kIndex>
using FormatOf = std::conditional_t<Rule::kStates[kIndex].sign == kSigned, SignedFormat, UnsignedFormat>;

// The bytes of quantized values.
template <class Format>
using Byte = std::conditional_t<Format::kSigned, int8_t, uint8_t>;

}  // namespace
}  // namespace adamops
