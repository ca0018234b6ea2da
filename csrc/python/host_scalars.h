// The scalars and options of a step on the host, for the modules of the CPU op and of the CUDA op: scalars are computed
// from the hyper-parameters of a param group, or given as rows.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "python/table.h"
#include "rules/selected.h"
#include "runtime/float_environment.h"

namespace adamops {

// The hyper-parameters as Python passes them: HYPER names them, in this order.
using HyperNumbers = std::array<double, kHyperCount>;

inline Rule::Hyper hyper_of(const HyperNumbers& numbers) {
  Rule::Hyper hyper;
  std::memcpy(&hyper, numbers.data(), sizeof hyper);
  return hyper;
}

// What a step multiplies grads by: the inverse of the loss scale, with a further factor, negative to maximize.
struct GradScaling {
  double loss_scale, factor;
  bool maximize;
};

// grad_scale and the rule's scalars before rounding: SCALARS names them. For values that no hyper-parameters give, as
// tests need.
using ScalarRow = std::array<double, 1 + kScalarCount>;

// The host's operations on doubles.
struct HostDoubles {
  static double mul(double x, double y) { return x * y; }
  static double add(double x, double y) { return x + y; }
  static double sub(double x, double y) { return x - y; }
  static double div(double x, double y) { return x / y; }
  static double sqrt(double x) { return std::sqrt(x); }
  static float to_float(double x) { return static_cast<float>(x); }
};

// The scalars of each step, bit-identical whatever the calling thread's floating-point environment is.
inline std::vector<StepScalars> scalars_of(const Rule::Hyper& hyper, const GradScaling& scaling,
                                           const std::vector<int64_t>& steps) {
  std::vector<StepScalars> scalars(steps.size());
  in_default_float_environment([&] {
    const float scale = grad_scale<HostDoubles>(scaling.maximize, scaling.loss_scale, scaling.factor);
    for (size_t i = 0; i < steps.size(); ++i)
      scalars[i] = {scale, Rule::scalars<HostDoubles>(hyper, steps[i]), static_cast<uint32_t>(steps[i])};
  });
  return scalars;
}

// The same from rows, one for each step.
inline std::vector<StepScalars> scalars_of(const std::vector<ScalarRow>& rows, const std::vector<int64_t>& steps) {
  if (rows.size() != steps.size())
    throw pybind11::value_error("scalars has " + std::to_string(rows.size()) + " rows, expected " +
                                std::to_string(steps.size()) + ", one for each of the table's steps");
  std::vector<StepScalars> scalars(steps.size());
  in_default_float_environment([&] {
    for (size_t i = 0; i < steps.size(); ++i) {
      std::array<float, 1 + kScalarCount> rounded;
      for (size_t j = 0; j < rounded.size(); ++j) rounded[j] = static_cast<float>(rows[i][j]);
      std::memcpy(&scalars[i], rounded.data(), sizeof rounded);
      scalars[i].step = static_cast<uint32_t>(steps[i]);
    }
  });
  return scalars;
}

// What a step does with a table. Raises ValueError for a mode that the rule does not have.
inline StepOptions options_of(const Table& table, int mode, bool zero_grads, bool stochastic_rounding) {
  if (mode < 0 || mode >= Rule::kModes)
    throw pybind11::value_error("mode is " + std::to_string(mode) + ", expected less than " +
                                std::to_string(Rule::kModes));
  return {static_cast<uint8_t>(table.state_count), static_cast<uint8_t>(mode), zero_grads, stochastic_rounding};
}

// Says which rule a module is of, and in which order it takes numbers.
inline void bind_rule(pybind11::module_& module) {
  pybind11::list hyper;
  for (const char* const name : Rule::kHyper) hyper.append(name);
  module.attr("HYPER") = pybind11::tuple(hyper);
  module.attr("SCALAR_COUNT") = 1 + kScalarCount;
}

}  // namespace adamops
