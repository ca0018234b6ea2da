// The dtypes of tensors that adamops works on. Shared by code compiled for different CPUs: no inline function.
#pragma once

#include <cstdint>

namespace adamops {

// Block codes are those of adam/quantized_blocks.h, which states may have.
enum Dtype : uint8_t { kFloat32, kBfloat16, kFloat16, kDtypeCount, kQuantized = kDtypeCount };

}  // namespace adamops
