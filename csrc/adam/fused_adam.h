// What the Python module of the CUDA op knows of its CUDA side: plain data and functions, no CUDA header. Failures are
// std::runtime_error with a message for the user.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../dtype.h"
#include "adam_scalars.h"

namespace adamops {

// One tensor with what belongs to it, all of `numel` elements in the same order in device memory.
struct CudaTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  float* master;         // the param in fp32; null without master weights
  int64_t numel;
};

// Where a step runs.
struct CudaPlace {
  int device;
  void* stream;
};

// The step of a param group on one device.
struct CudaAdamStep {
  std::vector<CudaTensor> tensors;
  std::vector<uint32_t> kinds;        // for each tensor, as adam_kind()
  std::vector<uint32_t> scalar_rows;  // for each tensor, which of `scalars` are its own
  std::vector<AdamScalars> scalars;
  const AdamScalars* device_scalars;  // or, if not null, for each tensor its own in device memory
  const float* found_inf;             // on the device; if not null and not 0, nothing happens
};

// What a step's kernel is compiled for, as one number.
uint32_t adam_kind(Dtype param, Dtype grad, Dtype state, bool master, bool l2, bool amsgrad);

// Enqueues the step. Throws std::invalid_argument, before anything runs, if there is no kernel for a kind.
void cuda_adam_step(const CudaAdamStep& step, CudaPlace place);

// Step counts on the device are counted, and the scalars of each tensor computed there.
struct CudaScalars {
  AdamHyper hyper;
  const float* lr32;        // the learning rate on the device as fp32, or null
  const double* lr64;       // or as fp64
  const float* loss_scale;  // on the device; null: 1
  const float* found_inf;   // on the device; if not null and not 0, no step is counted
  std::vector<float*> steps;
  AdamScalars* scalars;  // in device memory, room for one a tensor
};
void cuda_adam_scalars(const CudaScalars& work, CudaPlace place);

// What the CUDA runtime says of this machine; `problem` is why nothing can run, empty if something can.
struct CudaStatus {
  int runtime_version, driver_version, devices;
  std::string problem;
};
CudaStatus cuda_status();

}  // namespace adamops
