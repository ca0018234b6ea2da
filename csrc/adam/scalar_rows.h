// The scalars of a step as Python hands them over, for the modules of the CPU op and of the CUDA op.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "adam_update.h"

namespace adamops {

// The floats of AdamScalars, in order.
using ScalarRow = std::array<float, offsetof(AdamScalars, step) / sizeof(float)>;

// A row for each of the steps, with the step.
inline std::vector<AdamScalars> scalars_of(const std::vector<ScalarRow>& rows, const std::vector<int64_t>& steps) {
  if (rows.size() != steps.size())
    throw pybind11::value_error("scalars has " + std::to_string(rows.size()) + " rows, expected " +
                                std::to_string(steps.size()) + ", one for each of the table's steps");
  std::vector<AdamScalars> scalars(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(&scalars[i], rows[i].data(), sizeof(ScalarRow));
    scalars[i].step = static_cast<uint32_t>(steps[i]);
  }
  return scalars;
}

}  // namespace adamops
