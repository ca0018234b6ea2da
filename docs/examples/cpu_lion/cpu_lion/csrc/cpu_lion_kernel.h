// What the module knows of the kernels. Shared by code compiled for different CPUs: plain data, no inline function.
#pragma once

#include <cstdint>

#include "formats/dtype.h"
#include "lion_update.h"

namespace adamops {

struct LionTensor {
  void* param;
  const void* grad;
  void* exp_avg;
};

using LionRange = void (*)(const LionTensor&, int64_t begin, int64_t end, const LionScalars&, int prefetch_bytes);

struct LionTarget {
  const char* name;
  uint32_t required_features;         // of simd/cpu_features.h
  LionRange lion_range[kDtypeCount];  // by the dtype of param, grad and exp_avg
};

}  // namespace adamops
