// The scalars of one step, computed where the step count and the learning rate are: on the host or on the device. The
// same arithmetic in double, operation by operation, as AdamHyper.scalars() in adamops/optim/hyper.py.
#pragma once

#include <cstdint>

#include "rules/adam_update.h"

namespace adamops {

// The hyper-parameters of a param group.
struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay;
  bool bias_correction, adamw_mode, maximize;
};

// base ** exponent by squaring. The exponent is taken as unsigned: a step count in device memory may hold anything, and
// the loop must end.
template <class Ops>
ADAMOPS_HOST_DEVICE inline double integer_power(double base, int64_t exponent) {
  double result = 1.0;
  for (auto rest = static_cast<uint64_t>(exponent); rest; rest >>= 1) {
    if (rest & 1) result = Ops::mul(result, base);
    base = Ops::mul(base, base);
  }
  return result;
}

// `step` counts from 1. `Ops` are operations on doubles that round once. `loss_scale` is what the loss was multiplied
// by; `grad_factor` is a further factor for grads.
template <class Ops>
ADAMOPS_HOST_DEVICE inline AdamScalars adam_scalars(const AdamHyper& h, int64_t step, double loss_scale,
                                                    double grad_factor) {
  const double bias1 = h.bias_correction ? Ops::sub(1.0, integer_power<Ops>(h.beta1, step)) : 1.0;
  const double bias2 = h.bias_correction ? Ops::sub(1.0, integer_power<Ops>(h.beta2, step)) : 1.0;
  const bool l2 = !h.adamw_mode && h.weight_decay != 0.0;
  AdamScalars s;
  s.grad_scale = Ops::to_float(Ops::mul(Ops::div(h.maximize ? -1.0 : 1.0, loss_scale), grad_factor));
  s.beta1 = Ops::to_float(h.beta1);
  s.one_minus_beta1 = Ops::to_float(Ops::sub(1.0, h.beta1));
  s.beta2 = Ops::to_float(h.beta2);
  s.one_minus_beta2 = Ops::to_float(Ops::sub(1.0, h.beta2));
  s.negative_step_size = Ops::to_float(Ops::div(-h.lr, bias1));
  s.inverse_sqrt_bias2 = Ops::to_float(Ops::div(1.0, Ops::sqrt(bias2)));
  s.eps = Ops::to_float(h.eps);
  s.decay = h.adamw_mode ? Ops::to_float(Ops::sub(1.0, Ops::mul(h.lr, h.weight_decay))) : 1.0f;
  s.step = static_cast<uint32_t>(step);
  s.l2 = l2 ? Ops::to_float(h.weight_decay) : 0.0f;
  return s;
}

}  // namespace adamops
