// One tensor of a step, as the kernels on every device take it. Shared by code compiled for different CPUs: plain data.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace adamops {

// The storage of a param and what belongs to it, all of `numel` elements in the same order in memory.
struct AdamTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* master;         // the param in fp32, of which `param` is the rounded copy; null without master weights
  int64_t numel;
};

// The dtypes of a tensor's param, grad and states, and whether it has a master.
struct AdamDtypes {
  Dtype param, grad, state;
  bool master;
};

}  // namespace adamops
