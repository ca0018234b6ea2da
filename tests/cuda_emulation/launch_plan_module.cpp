// Test only: plan_launches() as a Python function.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch_plan.h"

PYBIND11_MODULE(launch_plan, module) {
  module.def("plan_launches", [](const std::vector<std::pair<int64_t, uint32_t>>& tensors, size_t most_tensors,
                                 int64_t chunk, uint32_t most_blocks) {
    std::vector<adamops::PlannedTensor> planned;
    for (const auto& [numel, kind] : tensors) planned.push_back({numel, kind});
    std::vector<std::tuple<uint32_t, std::vector<uint32_t>, std::vector<uint32_t>>> result;
    for (const auto& launch : adamops::plan_launches(planned, {most_tensors, chunk, most_blocks}))
      result.emplace_back(launch.kind, launch.tensors, launch.first_block);
    return result;
  });
}
