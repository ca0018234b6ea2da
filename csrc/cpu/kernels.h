// What the dispatcher knows of the CPU kernels: the tensors they take, and the table that each SIMD target offers.
// Shared by code compiled for different CPUs, so it holds plain data and declarations only: no inline functions.
#pragma once

#include <cstdint>

#include "grad_norm.h"
#include "rules/selected.h"
#include "tensor.h"

namespace adamops {

// What a kernel needs for a tensor's step besides the tensor. `prefetch_bytes` is the software prefetch distance, 0 for
// none.
struct Work {
  Dtypes dtypes;
  StepOptions options;
  StepScalars scalars;
  int prefetch_bytes;
};

// Updates the elements [begin, end) of a tensor; `begin` is a multiple of Partition::kGrain.
using StepRange = void (*)(const Tensor&, const Work&, int64_t begin, int64_t end);

// The bandwidth probe: reads and writes the same bytes as StepRange, but computes nothing. It is the limit that the
// benchmark compares with. `prefetch_bytes` is the software prefetch distance, 0 for none. The values stay as they are.
using ProbeRange = void (*)(const Tensor&, int64_t begin, int64_t end, int prefetch_bytes);

// The norm of `count` elements of a grad: the 1-norm, the square of the 2-norm, or the largest magnitude, each as a
// double.
using NormRange = double (*)(const void* grad, Dtype dtype, Norm norm, int64_t count);

// Sets `count` elements of a sum to those of a former one, which may be the same or null for zeros, plus those of a
// grad.
using AddRange = void (*)(const float* former, const void* grad, Dtype dtype, float* sum, int64_t count);

struct Target {
  const char* name;
  uint32_t required_features;  // of runtime/cpu_features.h
  // Null for combinations that are not supported. `in_blocks` selects the kernel that can do everything, one
  // quantization block after another.
  StepRange (*step_range)(Dtypes dtypes, StepOptions options, bool in_blocks);
  ProbeRange (*probe_range)(Dtypes dtypes);  // master weights are left alone
  NormRange norm_range;
  AddRange add_range;
};

}  // namespace adamops
