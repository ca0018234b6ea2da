// The scalars of a step on the host, for the modules of the CPU op and of the CUDA op: computed from the
// hyper-parameters of a param group, or given as rows.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "rules/adam_scalars.h"
#include "runtime/float_environment.h"

namespace adamops {

// What AdamHyper.numbers() in adamops/optim/hyper.py returns: lr, beta1, beta2, eps, weight_decay, bias_correction,
// adamw_mode, maximize, loss_scale, grad_factor.
using HyperNumbers = std::tuple<double, double, double, double, double, bool, bool, bool, double, double>;

// The floats of AdamScalars, in order, before rounding.
using ScalarRow = std::array<double, offsetof(AdamScalars, step) / sizeof(float)>;

// Either one gives the scalars of each step of a table. Rows are for values that no hyper-parameters give, as tests
// need.
using HostScalars = std::variant<HyperNumbers, std::vector<ScalarRow>>;

// The host's operations on doubles for adam_scalars().
struct HostDoubles {
  static double mul(double x, double y) { return x * y; }
  static double sub(double x, double y) { return x - y; }
  static double div(double x, double y) { return x / y; }
  static double sqrt(double x) { return std::sqrt(x); }
  static float to_float(double x) { return static_cast<float>(x); }
};

inline AdamScalars scalars_of(const HyperNumbers& numbers, int64_t step) {
  const auto& [lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode, maximize, loss_scale, grad_factor] =
      numbers;
  const AdamHyper hyper = {lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode, maximize};
  return adam_scalars<HostDoubles>(hyper, step, loss_scale, grad_factor);
}

inline AdamScalars scalars_of(const ScalarRow& row, int64_t step) {
  std::array<float, std::tuple_size_v<ScalarRow>> rounded;
  for (size_t i = 0; i < row.size(); ++i) rounded[i] = static_cast<float>(row[i]);
  AdamScalars scalars;
  std::memcpy(&scalars, rounded.data(), sizeof(rounded));
  scalars.step = static_cast<uint32_t>(step);
  return scalars;
}

// The scalars of each step, bit-identical whatever the calling thread's floating-point environment is.
inline std::vector<AdamScalars> scalars_of(const HostScalars& given, const std::vector<int64_t>& steps) {
  const auto* rows = std::get_if<std::vector<ScalarRow>>(&given);
  if (rows && rows->size() != steps.size())
    throw pybind11::value_error("scalars has " + std::to_string(rows->size()) + " rows, expected " +
                                std::to_string(steps.size()) + ", one for each of the table's steps");
  std::vector<AdamScalars> scalars(steps.size());
  in_default_float_environment([&] {
    for (size_t i = 0; i < steps.size(); ++i)
      scalars[i] = rows ? scalars_of((*rows)[i], steps[i]) : scalars_of(std::get<HyperNumbers>(given), steps[i]);
  });
  return scalars;
}

}  // namespace adamops
