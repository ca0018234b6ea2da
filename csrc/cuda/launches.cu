// The CUDA side of an op: which kernel, which launches, on which stream, and the error messages. The kernels
// are in cuda/direct.cuh and cuda/blocks.cuh; cuda/launch_plan.cpp splits a step into launches.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <memory>
#include <stdexcept>

#include "cuda/blocks.cuh"
#include "cuda/direct.cuh"
#include "cuda/grad_norm.cuh"
#include "cuda/launch_plan.h"
#include "cuda/launches.h"

namespace adamops {

namespace {

std::string version_in_words(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string problem_in_words(cudaError_t error) {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver found";
  if (error == cudaErrorInsufficientDriver)
    return "the NVIDIA driver supports CUDA " + version_in_words(driver) + ", and this build needs " +
           version_in_words(runtime) + "; install a newer driver, or build adamops with an older CUDA toolkit";
  return cudaGetErrorString(error);
}

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": CUDA error: " + problem_in_words(error));
}

// Changes the current device for the lifetime of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&former_), "finding the current device");
    if (former_ != device) check(cudaSetDevice(device), "choosing device " + std::to_string(device));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (former_ != device_) cudaSetDevice(former_);
  }

 private:
  int device_, former_ = 0;
};

using Kernel = void (*)(StepLaunch);

// A kernel for each number of states that may be in use: Kernels::of<number>().
template <class Kernels, int... kExtra>
Kernel kernel_of_count(int state_count, IndexList<kExtra...>) {
  static const Kernel kKernels[] = {Kernels::template of<kLeastStates + kExtra>()...};
  return kKernels[state_count - kLeastStates];
}
template <class Kernels>
Kernel kernel_of_count(int state_count) {
  return kernel_of_count<Kernels>(state_count, Indices<Rule::kOptionalStates + 1>{});
}

template <class Param, class Grad, class State, bool kMaster>
struct DirectKernels {
  template <int kStateCount>
  static Kernel of() {
    return direct_kernel<TensorKind<Param, Grad, State, kMaster, kStateCount>>;
  }
};
template <bool kQuantizedStates>
struct BlocksKernels {
  template <int kStateCount>
  static Kernel of() {
    return blocks_kernel<kStateCount, kQuantizedStates>;
  }
};

// Grads and states have the param's dtype or fp32. A master weight requires a 16-bit param and fp32 states.
template <class Param>
Kernel kernel_of_param(bool grad32, bool state32, bool master, int state_count) {
  if (master) {
    if (!state32) return nullptr;
    return grad32 ? kernel_of_count<DirectKernels<Param, float, float, true>>(state_count)
                  : kernel_of_count<DirectKernels<Param, Param, float, true>>(state_count);
  }
  if (state32)
    return grad32 ? kernel_of_count<DirectKernels<Param, float, float, false>>(state_count)
                  : kernel_of_count<DirectKernels<Param, Param, float, false>>(state_count);
  return grad32 ? kernel_of_count<DirectKernels<Param, float, Param, false>>(state_count)
                : kernel_of_count<DirectKernels<Param, Param, Param, false>>(state_count);
}

// A kernel with one pass over registers, for the most common cases; null for everything else.
Kernel direct_kernel_of(Dtypes dtypes, int state_count) {
  if (dtypes.state == kQuantized || dtypes.master > kMasterFp32) return nullptr;
  if (dtypes.state != dtypes.param && dtypes.state != kFloat32) return nullptr;
  const bool grad32 = dtypes.grad == kFloat32, state32 = dtypes.state == kFloat32;
  const bool master = dtypes.master == kMasterFp32;
  if (dtypes.param == kBfloat16) return kernel_of_param<bf16>(grad32, state32, master, state_count);
  if (dtypes.param == kFloat16) return kernel_of_param<fp16>(grad32, state32, master, state_count);
  return grad32 ? kernel_of_count<DirectKernels<float, float, float, false>>(state_count) : nullptr;
}

Kernel kernel_of(Dtypes dtypes, StepOptions options, bool lowp_out) {
  const bool plain = !lowp_out && !options.zero_grads && !options.stochastic_rounding;
  const Kernel direct = plain ? direct_kernel_of(dtypes, options.state_count) : nullptr;
  if (direct) return direct;
  if constexpr (kStatesOfRule > 0)
    if (dtypes.state == kQuantized) return kernel_of_count<BlocksKernels<true>>(options.state_count);
  return kernel_of_count<BlocksKernels<false>>(options.state_count);
}

// A kind is what the tensors of a launch have in common, as one number below kKinds.
constexpr uint32_t kKinds = kDtypeCount * kDtypeCount * (kDtypeCount + 1) * 4 * (kDtypeCount + 1);

uint32_t kind_of(Dtypes dtypes, bool lowp_out) {
  const uint32_t copy = lowp_out ? 1u + dtypes.lowp_out : 0;
  const uint32_t columns = dtypes.state + (kDtypeCount + 1) * (dtypes.master + 4u * copy);
  return dtypes.param + kDtypeCount * (dtypes.grad + kDtypeCount * columns);
}

}  // namespace

void cuda_step(const CudaStep& step, CudaPlace place) {
  std::vector<PlannedTensor> planned;
  planned.reserve(step.tensors.size());
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    if (!is_supported(step.dtypes[i]))
      throw std::invalid_argument("tensor " + std::to_string(i) +
                                  ": no kernel for these dtypes of param, grad, state and master");
    const uint32_t row = step.device_scalars ? 0 : step.scalar_rows[i];
    planned.push_back({step.tensors[i].numel, kind_of(step.dtypes[i], step.tensors[i].lowp_out) + kKinds * row});
  }
  const auto launches = plan_launches(planned, {kTensorsPerLaunch, kChunk, INT_MAX});
  if (launches.empty()) return;

  const DeviceGuard guard(place.device);
  const auto parameters = std::make_unique<StepLaunch>();
  for (size_t n = 0; n < launches.size(); ++n) {
    const PlannedLaunch& launch = launches[n];
    parameters->device_scalars = step.device_scalars;
    if (!step.device_scalars) parameters->scalars = step.scalars.at(launch.kind / kKinds);
    parameters->found_inf = step.found_inf;
    parameters->dtypes = step.dtypes[launch.tensors[0]];
    parameters->options = step.options;
    parameters->count = static_cast<uint32_t>(launch.tensors.size());
    for (size_t i = 0; i < launch.tensors.size(); ++i) {
      parameters->tensors[i] = step.tensors[launch.tensors[i]];
      parameters->rows[i] = launch.tensors[i];
      parameters->first_block[i] = launch.first_block[i];
    }
    void* arguments[] = {parameters.get()};
    const Kernel kernel = kernel_of(parameters->dtypes, step.options, parameters->tensors[0].lowp_out);
    check(cudaLaunchKernel(kernel, dim3(launch.blocks()), dim3(kThreads), arguments, 0,
                           static_cast<cudaStream_t>(place.stream)),
          ADAMOPS_EXPANDED_AND_QUOTED(ADAMOPS_MODULE) ": launch " + std::to_string(n + 1) + " of " +
              std::to_string(launches.size()) + " (" + std::to_string(launch.tensors.size()) + " tensors from tensor " +
              std::to_string(launch.tensors[0]) + " on, device " + std::to_string(place.device) + ")");
  }
}

void cuda_scalars(const CudaScalars& work, CudaPlace place) {
  if (work.steps.empty()) return;
  const DeviceGuard guard(place.device);
  const auto parameters = std::make_unique<ScalarsLaunch>();
  parameters->hyper = work.hyper;
  parameters->maximize = work.maximize;
  parameters->lr32 = work.lr32;
  parameters->lr64 = work.lr64;
  parameters->loss_scale = work.loss_scale;
  parameters->grad_factor = work.grad_factor;
  parameters->found_inf = work.found_inf;
  for (size_t first = 0; first < work.steps.size(); first += kStepsPerLaunch) {
    const size_t count = std::min<size_t>(kStepsPerLaunch, work.steps.size() - first);
    parameters->count = static_cast<uint32_t>(count);
    parameters->scalars = work.scalars + first;
    std::copy_n(work.steps.begin() + static_cast<std::ptrdiff_t>(first), count, parameters->steps);
    void* arguments[] = {parameters.get()};
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    check(cudaLaunchKernel(scalars_kernel, dim3(blocks), dim3(kThreads), arguments, 0,
                           static_cast<cudaStream_t>(place.stream)),
          "computing the scalars of a step on device " + std::to_string(place.device));
  }
}

void cuda_grad_norm(const CudaNorm& work, CudaPlace place) {
  std::vector<PlannedTensor> planned;
  std::vector<uint32_t> first_chunk;
  int64_t chunks = 0;
  for (size_t i = 0; i < work.grads.size(); ++i) {
    planned.push_back({work.numels[i], work.dtypes[i]});
    first_chunk.push_back(static_cast<uint32_t>(chunks));
    chunks += (work.numels[i] + kNormChunk - 1) / kNormChunk;
  }
  const DeviceGuard guard(place.device);
  const std::string where = "the norm of grads on device " + std::to_string(place.device);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const auto parameters = std::make_unique<NormLaunch>();
  parameters->partial = work.partial;
  parameters->norm = work.norm;
  for (const PlannedLaunch& launch : plan_launches(planned, {kGradsPerLaunch, kChunksPerBlock * kNormChunk, INT_MAX})) {
    parameters->dtype = static_cast<Dtype>(launch.kind);
    parameters->count = static_cast<uint32_t>(launch.tensors.size());
    for (size_t i = 0; i < launch.tensors.size(); ++i) {
      parameters->first_block[i] = launch.first_block[i];
      parameters->first_chunk[i] = first_chunk[launch.tensors[i]];
      parameters->grads[i] = work.grads[launch.tensors[i]];
      parameters->numels[i] = work.numels[launch.tensors[i]];
    }
    void* arguments[] = {parameters.get()};
    check(cudaLaunchKernel(norm_kernel, dim3(launch.blocks()), dim3(kThreads), arguments, 0, stream), where);
  }
  TotalLaunch total{work.partial, chunks, work.norm, work.total};
  void* arguments[] = {&total};
  check(cudaLaunchKernel(total_kernel, dim3(1), dim3(kLanes), arguments, 0, stream), where);
}

CudaStatus cuda_status() {
  CudaStatus status{0, 0, 0, ""};
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&status.devices);
  if (error != cudaSuccess) {
    status.devices = 0;
    status.problem = problem_in_words(error);
    cudaGetLastError();  // clears the error, so that no later check reports it
  }
  return status;
}

std::string cuda_problem(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    const auto* const kernel = reinterpret_cast<const void*>(&scalars_kernel);  // compiled like all others
    check(cudaFuncGetAttributes(&attributes, kernel), "device " + std::to_string(device));
  } catch (const std::runtime_error& error) {
    cudaGetLastError();
    return error.what();
  }
  return "";
}

}  // namespace adamops
