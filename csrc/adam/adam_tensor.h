// One tensor of a step, as the kernels on every device take it. Shared by code compiled for different CPUs: plain data.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace adamops {

// The storage of a param and what belongs to it, all of `numel` elements in the same order in memory, but for scales.
struct AdamTensor {
  void* param;
  void* grad;  // only read, unless the step zeroes it
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  void* master;          // what the param's dtype leaves out: see Master
  uint16_t* scales;  // bfloat16, for each block of quantized states: exp_avg's, exp_avg_sq's, max_exp_avg_sq's; or null
  void* lowp_out;    // where to write the new param in 16 bits as well, or null
  int64_t numel;
  uint32_t rng_offset;  // tells the tensor's random bits from those of others
};

// What a 16-bit param has beside it: nothing; the param in fp32, of which it is the rounded copy; or the 8 or 16 bits
// that it lacks (rounding.h).
enum Master : uint8_t { kNoMaster, kMasterFp32, kRemainder8, kRemainder16 };

// The dtypes of a tensor's columns.
struct AdamDtypes {
  Dtype param, grad, state;
  Master master;
  Dtype lowp_out;  // 16 bits; without meaning if there is none
};

// Whether kernels know what to do with these: grads have the param's dtype or fp32, or 16 bits beside fp32 params, and
// masters go with 16-bit params.
// Of internal linkage, as all that code compiled for different CPUs shares.
static constexpr bool fit(AdamDtypes d) {
  return (d.grad == d.param || d.grad == kFloat32 || d.param == kFloat32) &&
         (d.master == kNoMaster || (d.param != kFloat32 && (d.master != kMasterFp32 || d.state == kFloat32)));
}

// What a step does to all its tensors.
struct AdamMode {
  bool l2, amsgrad;
  bool zero_grads;           // also sets grads to zero
  bool stochastic_rounding;  // rounds 16-bit params, or their masters of 24 bits, at random
};

}  // namespace adamops
