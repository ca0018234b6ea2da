// The Python module. Callers are trusted with addresses: lion.py checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "python/column.h"
#include "cpu_lion_kernel.h"
#include "python/cpu_op.h"

namespace py = pybind11;

namespace adamops {

#define ADAMOPS_TARGET_TYPE LionTarget
ADAMOPS_TARGETS(ADAMOPS_DECLARE_TARGET)

namespace {

SimdTargets<LionTarget> simd_targets{ADAMOPS_TARGETS(ADAMOPS_TARGET_ADDRESS)};

void lion_step(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& numels,
               const py::list& dtypes, const std::array<float, 6>& scalar_row, int threads) {
  const size_t count = params.size();
  const Column param(params, count, "params"), grad(grads, count, "grads"), exp_avg(exp_avgs, count, "exp_avgs"),
      numel(numels, count, "numels"), dtype(dtypes, count, "dtypes");
  std::vector<LionTensor> tensors;
  std::vector<LionRange> ranges;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < count; ++i) {
    if (dtype[i] >= kDtypeCount) throw py::value_error("unknown dtype code " + std::to_string(dtype[i]));
    tensors.push_back({param.pointer<void>(i), grad.pointer<const void>(i), exp_avg.pointer<void>(i)});
    ranges.push_back(simd_targets.in_use().lion_range[dtype[i]]);
    sizes.push_back(static_cast<int64_t>(numel[i]));
  }
  LionScalars scalars;
  static_assert(sizeof(scalars) == sizeof(scalar_row));
  std::memcpy(&scalars, scalar_row.data(), sizeof(scalars));
  const int prefetch_bytes = prefetch_distance_bytes();
  for_each_piece(sizes, threads, [&](size_t i, int64_t begin, int64_t end) {
    ranges[i](tensors[i], begin, end, scalars, prefetch_bytes);
  });
}

}  // namespace
}  // namespace adamops

PYBIND11_MODULE(_cpu_lion, module) {
  module.doc() = "Lion on addresses. See cpu_lion.cpp.";
  adamops::simd_targets.bind(module);
  module.def("lion_step", &adamops::lion_step, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
             py::arg("numels"), py::arg("dtypes"), py::arg("scalars"), py::arg("threads"),
             "One step for tensors given as addresses, sizes and dtype codes, with the scalars of lion_update.h.");
}
