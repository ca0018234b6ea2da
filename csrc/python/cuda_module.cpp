// The Python module of a CUDA op. It takes tables of addresses, sizes and dtypes, so it needs no torch to build or
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

// Enqueues the step of a table. `scalars` are those of each of its steps, unless they lie on the device.
void enqueue(Table& table, std::vector<StepScalars> scalars, StepOptions options, uintptr_t device_scalars,
             uintptr_t found_inf, int device, uintptr_t stream) {
  if (!device_scalars && table.counts_on_device())
    throw py::value_error("step counts on the device need scalars there");
  const CudaStep step{table.tensors,
                      table.dtypes,
                      options,
                      std::move(scalars),
                      table.step_rows,
                      pointer<const StepScalars>(device_scalars),
                      pointer<const float>(found_inf)};
  {
    const GilRelease release;
    cuda_step(step, {device, pointer<void>(stream)});
  }
  table.count_steps();
  table.release();
}

void step(Table& table, const HyperNumbers& numbers, double loss_scale, double grad_factor, bool maximize,
          bool zero_grads, bool stochastic_rounding, uintptr_t device_scalars, uintptr_t found_inf, int device,
          uintptr_t stream) {
  const Rule::Hyper hyper = hyper_of(numbers);
  std::vector<StepScalars> scalars;
  if (!device_scalars) scalars = scalars_of(hyper, {loss_scale, grad_factor, maximize}, table.steps);
  enqueue(table, std::move(scalars), options_of(table, Rule::mode(hyper), zero_grads, stochastic_rounding),
          device_scalars, found_inf, device, stream);
}

void step_with_scalars(Table& table, const std::vector<ScalarRow>& rows, int mode, uintptr_t device_scalars,
                       uintptr_t found_inf, int device, uintptr_t stream, bool zero_grads, bool stochastic_rounding) {
  std::vector<StepScalars> scalars;
  if (!device_scalars) scalars = scalars_of(rows, table.steps);
  enqueue(table, std::move(scalars), options_of(table, mode, zero_grads, stochastic_rounding), device_scalars,
          found_inf, device, stream);
}

void count_steps(const Table& table, uintptr_t scalars, const HyperNumbers& numbers, bool maximize, uintptr_t lr32,
                 uintptr_t lr64, uintptr_t loss_scale, uintptr_t grad_factor, uintptr_t found_inf, int device,
                 uintptr_t stream) {
  const CudaScalars work{hyper_of(numbers),
                         maximize,
                         pointer<const float>(lr32),
                         pointer<const double>(lr64),
                         pointer<const float>(loss_scale),
                         pointer<const double>(grad_factor),
                         pointer<const float>(found_inf),
                         table.device_steps,
                         pointer<StepScalars>(scalars)};
  const GilRelease release;
  cuda_scalars(work, {device, pointer<void>(stream)});
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

PYBIND11_MODULE(ADAMOPS_MODULE, module) {
  using namespace adamops;
  module.doc() =
      "A CUDA op of adamops: the update of an optimizer on device addresses. See csrc/python/cuda_module.cpp.";
  module.attr("SCALARS_SIZE") = sizeof(StepScalars);
  bind_table(module, Rule::kStates, kLeastStates);
  bind_rule(module);
  module.def("step", &step, py::arg("table"), py::arg("hyper"), py::arg("loss_scale"), py::arg("grad_factor"),
             py::arg("maximize"), py::arg("zero_grads"), py::arg("stochastic_rounding"), py::arg("device_scalars"),
             py::arg("found_inf"), py::arg("device"), py::arg("stream"),
             "Enqueues one step for the table's tensors, counts it in the states that the table was made from, and "
             "releases the references to the tensors. Its scalars follow from `hyper`, the numbers that HYPER names, "
             "or lie on the device, one after another for each tensor, where the address device_scalars is not 0.");
  module.def("step_with_scalars", &step_with_scalars, py::arg("table"), py::arg("scalars"), py::arg("mode"),
             py::arg("device_scalars"), py::arg("found_inf"), py::arg("device"), py::arg("stream"),
             py::arg("zero_grads") = false, py::arg("stochastic_rounding") = false,
             "The same with a row of SCALAR_COUNT scalars for each of the table's steps. For tests.");
  module.def("count_steps", &count_steps, py::arg("table"), py::arg("scalars"), py::arg("hyper"), py::arg("maximize"),
             py::arg("lr32"), py::arg("lr64"), py::arg("loss_scale"), py::arg("grad_factor"), py::arg("found_inf"),
             py::arg("device"), py::arg("stream"),
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
