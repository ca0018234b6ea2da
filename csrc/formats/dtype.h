// The dtypes of the tensors that adamops works on. Shared by code compiled for different CPUs, so nothing here has
// external linkage.
#pragma once

#include <cstdint>

namespace adamops {

// kQuantized is for optimizer states only: the 8-bit format of formats/quantized_blocks.h.
enum Dtype : uint8_t { kFloat32, kBfloat16, kFloat16, kDtypeCount, kQuantized = kDtypeCount };

// What is known of each dtype, in the order of the enum: torch's name for it, the bytes of an element, and the type
// code that DLPack has for it (its DLDataTypeCode: 2 is kDLFloat, 4 kDLBfloat). Quantized states are read as integers.
struct DtypeFacts {
  const char* name;
  int64_t bytes;
  uint8_t dlpack_code;
};
static constexpr DtypeFacts kDtypes[] = {{"float32", 4, 2}, {"bfloat16", 2, 4}, {"float16", 2, 2}, {"quantized", 1, 0}};
static_assert(sizeof(kDtypes) / sizeof(kDtypes[0]) == kQuantized + 1, "a row for each dtype");

static constexpr int64_t size_of(Dtype dtype) {
  return kDtypes[dtype].bytes;
}

}  // namespace adamops
