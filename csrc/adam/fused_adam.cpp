// The Python module of the CUDA op: takes columns of addresses, sizes and dtype codes, so it needs no torch to build or
// to run, and imports on machines without a GPU or a driver. Callers are trusted with addresses.
#include "fused_adam.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>

#include "../column.h"

namespace py = pybind11;

namespace adamops {
namespace {

using ScalarRow = std::array<float, sizeof(AdamScalars) / sizeof(float)>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void adam_step(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
               const std::optional<py::list>& max_exp_avg_sqs, const std::optional<py::list>& masters,
               const py::list& numels, const py::list& dtypes, bool l2, const std::vector<ScalarRow>& scalars,
               const py::list& scalar_rows, uintptr_t device_scalars, uintptr_t found_inf, int device,
               uintptr_t stream) {
  const size_t count = params.size();
  const py::list& max_list = max_exp_avg_sqs ? *max_exp_avg_sqs : params;
  const py::list& master_list = masters ? *masters : params;
  const Column param(params, count, "params"), grad(grads, count, "grads"), exp_avg(exp_avgs, count, "exp_avgs"),
      exp_avg_sq(exp_avg_sqs, count, "exp_avg_sqs"), max_exp_avg_sq(max_list, count, "max_exp_avg_sqs"),
      master(master_list, count, "masters"), numel(numels, count, "numels"), code(dtypes, count, "dtypes"),
      row(device_scalars ? params : scalar_rows, count, "scalar_rows");
  CudaAdamStep step{{}, {}, {}, {}, pointer<const AdamScalars>(device_scalars), pointer<const float>(found_inf)};
  for (const ScalarRow& values : scalars) std::memcpy(&step.scalars.emplace_back(), values.data(), sizeof(AdamScalars));
  for (size_t i = 0; i < count; ++i) {
    if (code[i] >= kDtypeCount * kDtypeCount * kDtypeCount)
      throw py::value_error("unknown dtype code " + std::to_string(code[i]));
    if (!device_scalars && row[i] >= step.scalars.size())
      throw py::value_error("tensor " + std::to_string(i) + " has no row of scalars");
    float* const own_master = masters ? master.pointer<float>(i) : nullptr;
    step.tensors.push_back({param.pointer<void>(i), grad.pointer<const void>(i), exp_avg.pointer<void>(i),
                            exp_avg_sq.pointer<void>(i), max_exp_avg_sqs ? max_exp_avg_sq.pointer<void>(i) : nullptr,
                            own_master, static_cast<int64_t>(numel[i])});
    step.kinds.push_back(adam_kind(static_cast<Dtype>(code[i] % kDtypeCount),
                                   static_cast<Dtype>(code[i] / kDtypeCount % kDtypeCount),
                                   static_cast<Dtype>(code[i] / kDtypeCount / kDtypeCount), own_master != nullptr, l2,
                                   max_exp_avg_sqs.has_value()));
    step.scalar_rows.push_back(device_scalars ? 0 : static_cast<uint32_t>(row[i]));
  }
  const py::gil_scoped_release release;
  cuda_adam_step(step, {device, pointer<void>(stream)});
}

void count_steps(const py::list& steps, uintptr_t scalars, double lr, uintptr_t lr32, uintptr_t lr64, double beta1,
                 double beta2, double eps, double weight_decay, bool bias_correction, bool adamw_mode, bool maximize,
                 uintptr_t loss_scale, uintptr_t found_inf, int device, uintptr_t stream) {
  CudaScalars work{{lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode, maximize},
                   pointer<const float>(lr32),
                   pointer<const double>(lr64),
                   pointer<const float>(loss_scale),
                   pointer<const float>(found_inf),
                   {},
                   pointer<AdamScalars>(scalars)};
  const Column step(steps, steps.size(), "steps");
  for (size_t i = 0; i < steps.size(); ++i) work.steps.push_back(step.pointer<float>(i));
  const py::gil_scoped_release release;
  cuda_adam_scalars(work, {device, pointer<void>(stream)});
}

}  // namespace
}  // namespace adamops

PYBIND11_MODULE(fused_adam, module) {
  using namespace adamops;
  module.doc() = "The CUDA op of adamops: Adam on device addresses. See csrc/adam/fused_adam.cpp.";
  module.attr("SCALARS_SIZE") = sizeof(AdamScalars);
  module.def(
      "adam_step", &adam_step, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
      py::arg("max_exp_avg_sqs"), py::arg("masters"), py::arg("numels"), py::arg("dtypes"), py::arg("l2"),
      py::arg("scalars"), py::arg("scalar_rows"), py::arg("device_scalars"), py::arg("found_inf"), py::arg("device"),
      py::arg("stream"),
      "Enqueues one step. Addresses are trusted; an address of 0 in `masters` is a tensor without; a dtype code is "
      "param + 3 * grad + 9 * state. Scalars come as rows and the row of each tensor, or lie on the device, one "
      "after another, where device_scalars is not 0.");
  module.def("count_steps", &count_steps, py::arg("steps"), py::arg("scalars"), py::arg("lr"), py::arg("lr32"),
             py::arg("lr64"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
             py::arg("bias_correction"), py::arg("adamw_mode"), py::arg("maximize"), py::arg("loss_scale"),
             py::arg("found_inf"), py::arg("device"), py::arg("stream"),
             "Enqueues the counting of steps kept on the device, as addresses of float32, and writes each tensor's "
             "scalars, SCALARS_SIZE bytes, to device memory at `scalars`. Addresses of 0 stand for nothing given.");
  module.def(
      "status",
      [] {
        const CudaStatus status = cuda_status();
        py::dict facts;
        facts["runtime_version"] = status.runtime_version;
        facts["driver_version"] = status.driver_version;
        facts["devices"] = status.devices;
        facts["problem"] = status.problem;
        return facts;
      },
      "The versions of the CUDA runtime linked in and of the driver (0: none), as 1000 * major + 10 * minor; the "
      "number "
      "of devices; and why nothing can run, or an empty string.");
}
