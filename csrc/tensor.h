// One tensor of a step, as the kernels of every device take it. Shared by code compiled for different CPUs, so it holds
// plain data only.
#pragma once

#include <cstdint>

#include "formats/dtype.h"
#include "rules/rule.h"

namespace adamops {

// The storage of a param and what belongs to it. All columns but `scales` have `numel` elements, in the same order in
// memory.
struct Tensor {
  void* param;
  void* grad;                 // read-only, unless the step zeroes it
  void* states[kMostStates];  // null for states that are not in use
  void* master;               // master weight or remainder: see Master
  uint16_t* scales;           // bfloat16, per quantization block: one for each state; or null
  void* lowp_out;             // where to also write the new param in 16 bits, or null
  int64_t numel;
  uint32_t rng_offset;  // separates the tensor's random bits from those of others
};

// The master weight of a 16-bit param: none; the param in fp32, of which it is the rounded copy; or a split master
// weight, the param with a remainder of 8 or 16 bits (formats/split_masters.h).
enum Master : uint8_t { kNoMaster, kMasterFp32, kRemainder8, kRemainder16 };

// The dtypes of a tensor's columns.
struct Dtypes {
  Dtype param, grad, state;
  Master master;
  Dtype lowp_out;  // 16 bits; meaningless if there is none
};

// Whether kernels support this combination: grads have the param's dtype or fp32, or 16 bits for fp32 params. Master
// weights require 16-bit params, and fp32 ones also fp32 states. Internal linkage, like everything that code compiled
// for different CPUs shares.
static constexpr bool is_supported(Dtypes d) {
  return (d.grad == d.param || d.grad == kFloat32 || d.param == kFloat32) &&
         (d.master == kNoMaster || (d.param != kFloat32 && (d.master != kMasterFp32 || d.state == kFloat32)));
}

// What a step does with all its tensors.
struct StepOptions {
  uint8_t state_count;       // how many states are in use
  uint8_t mode;              // of the rule
  bool zero_grads;           // also sets grads to zero
  bool stochastic_rounding;  // for 16-bit params, or their 24-bit master weights
};

}  // namespace adamops
