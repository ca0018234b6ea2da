// What the dispatcher knows of the CPU kernels: the tensors they take and the table that each SIMD target offers.
// Shared by code compiled for different CPUs, so it holds plain data and declarations only: no inline function.
#pragma once

#include <cstdint>

#include "adam_tensor.h"
#include "adam_update.h"

namespace adamops {

// Updates the elements [begin, end) of a tensor, asking for memory `prefetch_bytes` ahead of its use.
using AdamRange = void (*)(const AdamTensor&, int64_t begin, int64_t end, const AdamScalars&, int prefetch_bytes);

// Reads and writes the same bytes as AdamRange with nothing to compute: the limit that the benchmark compares with.
// Prefetches `prefetch_bytes` ahead, 0 for not at all. The values are destroyed.
using TouchRange = void (*)(const AdamTensor&, int64_t begin, int64_t end, int prefetch_bytes);

struct AdamTarget {
  const char* name;
  uint32_t required_features;  // of simd/cpu_features.h
  // Null for combinations that do not exist: grads have the dtype of the params or fp32, and so have the states;
  // masters go with 16-bit params and fp32 states.
  AdamRange (*adam_range)(AdamDtypes dtypes, bool l2, bool amsgrad);
  TouchRange (*touch_range)(AdamDtypes dtypes);  // masters are left alone
};

}  // namespace adamops
