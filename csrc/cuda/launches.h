// The interface between the Python module of the CUDA op and its CUDA side: plain data and functions, no CUDA header.
// Failures are std::runtime_error with a message for the user.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "grad_norm.h"
#include "rules/selected.h"
#include "tensor.h"

namespace adamops {

// Where a step runs.
struct CudaPlace {
  int device;
  void* stream;
};

// The step of a param group on one device. Every vector but `scalars` has one entry per tensor.
struct CudaStep {
  const std::vector<Tensor>& tensors;
  const std::vector<Dtypes>& dtypes;
  StepOptions options;
  std::vector<StepScalars> scalars;
  const std::vector<uint32_t>& scalar_rows;  // for each tensor, its index in `scalars`; unused with device_scalars
  const StepScalars* device_scalars;         // or, if not null, in device memory, one per tensor
  const float* found_inf;                    // on the device; if not null and not 0, the step is skipped
};

// Enqueues the step. Throws std::invalid_argument, before anything runs, if there is no kernel for a tensor's dtypes.
void cuda_step(const CudaStep& step, CudaPlace place);

// Counts steps on the device, and computes the scalars of each tensor there.
struct CudaScalars {
  Rule::Hyper hyper;
  bool maximize;
  const float* lr32;          // the learning rate on the device as fp32, or null
  const double* lr64;         // or as fp64
  const float* loss_scale;    // on the device; null: 1
  const double* grad_factor;  // on the device; null: 1
  const float* found_inf;     // on the device; if not null and not 0, no step is counted
  const std::vector<float*>& steps;
  StepScalars* scalars;  // in device memory, one per tensor
};
void cuda_scalars(const CudaScalars& work, CudaPlace place);

// The norm of grads, all on the device. `partial` is scratch: one double per chunk of kNormChunk elements of each grad.
struct CudaNorm {
  std::vector<const void*> grads;
  std::vector<int64_t> numels;
  std::vector<Dtype> dtypes;
  Norm norm;
  double *partial, *total;
};
void cuda_grad_norm(const CudaNorm& work, CudaPlace place);

// What the CUDA runtime reports about this machine. `problem` is why nothing can run; empty if something can.
struct CudaStatus {
  int runtime_version, driver_version, devices;
  std::string problem;
};
CudaStatus cuda_status();

// Why the kernels cannot run on a device, for example because they were not compiled for its architecture; empty if
// they can.
std::string cuda_problem(int device);

}  // namespace adamops
