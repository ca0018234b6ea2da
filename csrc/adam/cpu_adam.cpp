// The Python module of the CPU op. It takes addresses, sizes and dtype codes, so it needs no torch to build or to run;
// picks the kernel for this CPU; and splits the work over threads. The arithmetic is in adam_update.h. Callers are
// trusted with addresses: adamops/ops/adam/native_backend.py checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "../column.h"
#include "../cpu_op.h"
#include "adam_table.h"
#include "cpu_adam_kernel.h"

namespace py = pybind11;

namespace adamops {

#define ADAMOPS_TARGET_TYPE AdamTarget
ADAMOPS_TARGETS(ADAMOPS_DECLARE_TARGET)

namespace {

SimdTargets<AdamTarget> simd_targets{ADAMOPS_TARGETS(ADAMOPS_TARGET_ADDRESS)};

std::vector<int64_t> sizes_of(const AdamTable& table) {
  std::vector<int64_t> sizes;
  sizes.reserve(table.tensors.size());
  for (const AdamTensor& tensor : table.tensors) sizes.push_back(tensor.numel);
  return sizes;
}

using ScalarRow = std::array<float, sizeof(AdamScalars) / sizeof(float)>;

// The kernel of each tensor of the table; `choose` gives null for dtypes that do not go together.
template <class Range, class Choose>
std::vector<Range> kernels(const AdamTable& table, const Choose& choose) {
  std::vector<Range> ranges;
  ranges.reserve(table.tensors.size());
  for (const AdamDtypes& dtypes : table.dtypes) {
    ranges.push_back(choose(dtypes));
    if (!ranges.back()) throw py::value_error("no kernel for these dtypes of param, grad, state and master");
  }
  return ranges;
}

void adam_step(AdamTable& table, const std::vector<ScalarRow>& scalar_rows, bool l2, int threads) {
  const AdamTarget& target = simd_targets.in_use();
  const auto ranges =
      kernels<AdamRange>(table, [&](const AdamDtypes& dtypes) { return target.adam_range(dtypes, l2, table.amsgrad); });
  if (table.counts_on_device()) throw py::value_error("the CPU op takes step counts as numbers");
  if (scalar_rows.size() != table.steps.size())
    throw py::value_error("scalars has " + std::to_string(scalar_rows.size()) + " rows, expected " +
                          std::to_string(table.steps.size()) + ", one for each of the table's steps");
  std::vector<AdamScalars> scalars(scalar_rows.size());
  for (size_t i = 0; i < scalars.size(); ++i) std::memcpy(&scalars[i], scalar_rows[i].data(), sizeof(AdamScalars));

  table.count_steps();  // before the update, as the states are still in the caches
  static const int prefetch_bytes = prefetch_distance_bytes();
  for_each_piece(sizes_of(table), threads, [&](size_t i, int64_t begin, int64_t end) {
    ranges[i](table.tensors[i], begin, end, scalars[table.step_rows[i]], prefetch_bytes);
  });
  table.release();
}

void touch(const AdamTable& table, int prefetch_bytes, int threads) {
  const AdamTarget& target = simd_targets.in_use();
  const auto ranges = kernels<TouchRange>(table, target.touch_range);
  for_each_piece(sizes_of(table), threads, [&](size_t i, int64_t begin, int64_t end) {
    ranges[i](table.tensors[i], begin, end, prefetch_bytes);
  });
}

void zero_fill(const py::list& addresses, const py::list& numels, int element_size, int threads) {
  const size_t count = addresses.size();
  const Column address(addresses, count, "addresses"), numel(numels, count, "numels");
  std::vector<char*> starts(count);
  std::vector<int64_t> sizes(count);
  for (size_t i = 0; i < count; ++i) {
    starts[i] = address.pointer<char>(i);
    sizes[i] = static_cast<int64_t>(numel[i]);
  }
  for_each_piece(sizes, threads, [&](size_t i, int64_t begin, int64_t end) {
    std::memset(starts[i] + begin * element_size, 0, static_cast<size_t>((end - begin) * element_size));
  });
}

}  // namespace
}  // namespace adamops

PYBIND11_MODULE(cpu_adam, module) {
  using namespace adamops;
  module.doc() = "The CPU op of adamops: Adam on addresses. See csrc/adam/cpu_adam.cpp.";
  simd_targets.bind(module);
  bind_adam_table(module);
  module.def("adam_step", &adam_step, py::arg("table"), py::arg("scalars"), py::arg("l2"), py::arg("threads"),
             "One step for the table's tensors, with a row of scalars for each of the table's steps. Counts it in the "
             "states that the table was made from, and lets go of the tensors.");
  module.def("zero_fill", &zero_fill, py::arg("addresses"), py::arg("numels"), py::arg("element_size"),
             py::arg("threads"),
             "Zeroes tensors with the split of adam_step, so that each page lies near the thread that will use it.");
  module.def("touch", &touch, py::arg("table"), py::arg("prefetch_bytes"), py::arg("threads"),
             "Moves the bytes of adam_step and computes nothing; destroys the values. For the benchmark.");
}
