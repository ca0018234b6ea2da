// The order of a norm as Python passes it, for the modules of the CPU op and of the CUDA op.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>

#include "grad_norm.h"

namespace adamops {

inline Norm norm_of_type(double norm_type) {
  if (norm_type == 1.0) return kNorm1;
  if (norm_type == 2.0) return kNorm2;
  if (std::isinf(norm_type) && norm_type > 0) return kNormInf;
  throw pybind11::value_error("norm_type must be 1, 2 or infinity");
}

}  // namespace adamops
