// The Python module of the CUDA op. It takes tables of addresses, sizes and dtypes, so it needs no torch to build or
// run, and imports on machines without a GPU or a driver. Addresses from callers are trusted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launches.h"
#include "python/column.h"
#include "python/gil.h"
#include "python/host_scalars.h"
#include "python/norm_type.h"
#include "python/table.h"

namespace py = pybind11;

namespace adamops {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void adam_step(AdamTable& table, const HostScalars& host_scalars, bool l2, uintptr_t device_scalars,
               uintptr_t found_inf, int device, uintptr_t stream, bool zero_grads, bool stochastic_rounding) {
  CudaAdamStep step{table.tensors,
                    table.dtypes,
                    {l2, table.amsgrad, zero_grads, stochastic_rounding},
                    {},
                    table.step_rows,
                    pointer<const AdamScalars>(device_scalars),
                    pointer<const float>(found_inf)};
  if (!device_scalars) {
    if (table.counts_on_device()) throw py::value_error("step counts on the device need scalars there");
    step.scalars = scalars_of(host_scalars, table.steps);
  }
  {
    const GilRelease release;
    cuda_adam_step(step, {device, pointer<void>(stream)});
  }
  table.count_steps();
  table.release();
}

void count_steps(const AdamTable& table, uintptr_t scalars, double lr, uintptr_t lr32, uintptr_t lr64, double beta1,
                 double beta2, double eps, double weight_decay, bool bias_correction, bool adamw_mode, bool maximize,
                 uintptr_t loss_scale, uintptr_t found_inf, int device, uintptr_t stream, uintptr_t grad_factor) {
  const CudaScalars work{{lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode, maximize},
                         pointer<const float>(lr32),
                         pointer<const double>(lr64),
                         pointer<const float>(loss_scale),
                         pointer<const double>(grad_factor),
                         pointer<const float>(found_inf),
                         table.device_steps,
                         pointer<AdamScalars>(scalars)};
  const GilRelease release;
  cuda_adam_scalars(work, {device, pointer<void>(stream)});
}

void grad_norm(const py::list& addresses, const py::list& numels, const py::list& dtypes, double norm_type,
               uintptr_t partial, uintptr_t total, int device, uintptr_t stream) {
  const size_t count = addresses.size();
  const Column address(addresses, count, "addresses"), numel(numels, count, "numels"), dtype(dtypes, count, "dtypes");
  CudaNorm work{{}, {}, {}, norm_of_type(norm_type), pointer<double>(partial), pointer<double>(total)};
  for (size_t i = 0; i < count; ++i) {
    if (dtype[i] >= kDtypeCount) throw py::value_error("unknown dtype code " + std::to_string(dtype[i]));
    work.grads.push_back(address.pointer<const void>(i));
    work.numels.push_back(static_cast<int64_t>(numel[i]));
    work.dtypes.push_back(static_cast<Dtype>(dtype[i]));
  }
  const GilRelease release;
  cuda_grad_norm(work, {device, pointer<void>(stream)});
}

}  // namespace
}  // namespace adamops

PYBIND11_MODULE(fused_adam, module) {
  using namespace adamops;
  module.doc() = "The CUDA op of adamops: Adam on device addresses. See csrc/python/cuda_module.cpp.";
  module.attr("SCALARS_SIZE") = sizeof(AdamScalars);
  bind_adam_table(module);
  module.def(
      "adam_step", &adam_step, py::arg("table"), py::arg("scalars"), py::arg("l2"), py::arg("device_scalars"),
      py::arg("found_inf"), py::arg("device"), py::arg("stream"), py::arg("zero_grads") = false,
      py::arg("stochastic_rounding") = false,
      "Enqueues one step for the table's tensors, counts it in the states that the table was made from, and releases "
      "the references to the tensors. Scalars come from AdamHyper.numbers() or as a row for each of the table's steps, "
      "or lie on the device, one after another for each tensor, where the address device_scalars is not 0.");
  module.def("count_steps", &count_steps, py::arg("table"), py::arg("scalars"), py::arg("lr"), py::arg("lr32"),
             py::arg("lr64"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
             py::arg("bias_correction"), py::arg("adamw_mode"), py::arg("maximize"), py::arg("loss_scale"),
             py::arg("found_inf"), py::arg("device"), py::arg("stream"), py::arg("grad_factor") = 0,
             "Enqueues the counting of the table's steps, which must be kept on the device, and writes each tensor's "
             "scalars, SCALARS_SIZE bytes, to device memory at `scalars`. An address of 0 means that there is none.");
  module.attr("NORM_CHUNK") = kNormChunk;
  module.def("grad_norm", &grad_norm, py::arg("addresses"), py::arg("numels"), py::arg("dtypes"), py::arg("norm_type"),
             py::arg("partial"), py::arg("total"), py::arg("device"), py::arg("stream"),
             "Enqueues the computing of the norm of all elements of grads, a double at the device address `total`, of "
             "the bits that cpu_adam.grad_norm() has. `partial` is room for a double for every NORM_CHUNK elements of "
             "each grad, rounded up.");
  module.def("problem", &cuda_problem, py::arg("device"),
             "Why the op cannot run on a device; an empty string if it can.");
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
      "number of devices; and why nothing can run, or an empty string.");
}
