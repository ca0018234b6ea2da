// The dtypes of the tensors that adamops works on. Shared by code compiled for different CPUs, so it has no inline
// functions.
#pragma once

#include <cstdint>

namespace adamops {

// kQuantized is for optimizer states only: the 8-bit format of formats/quantized_blocks.h.
enum Dtype : uint8_t { kFloat32, kBfloat16, kFloat16, kDtypeCount, kQuantized = kDtypeCount };

}  // namespace adamops
