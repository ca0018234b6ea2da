// The Adam update rule: the only place that holds it, used by every backend. Must not know of memory, threads, dtypes
// or instruction sets. A backend passes its number type as `Ops`, whose functions each round once (IEEE nearest-even).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamops {

// The scalars of one step, computed in double and rounded to float once (rules/adam_scalars.h, on the host or on the
// device). t is the step count; beta1 and beta2 are the decay rates of Kingma & Ba (arXiv 1412.6980, Algorithm 1).
struct AdamScalars {
  float grad_scale;          // s: a factor for every gradient; -1 maximizes, 1 changes no bit
  float beta1;               // b1
  float one_minus_beta1;     // c1
  float beta2;               // b2
  float one_minus_beta2;     // c2
  float negative_step_size;  // -a = -lr / (1 - beta1^t)
  float inverse_sqrt_bias2;  // r = 1 / sqrt(1 - beta2^t)
  float eps;                 // e
  float decay;               // w = 1 - lr * weight_decay (AdamW, arXiv 1711.05101); 1 in L2 mode, which changes no bit
  float l2;                  // l = weight_decay (L2 mode only)
  uint32_t step;             // t, for rounding noise; counted by the op, not by its caller
};

// The same scalars as numbers of the backend (vectors with equal lanes, or plain floats), made once per range of
// elements.
template <class Ops>
struct AdamConstants {
  using Number = typename Ops::Number;
  Number grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, negative_step_size, inverse_sqrt_bias2, eps, decay,
      l2;
  bool scaled;

  // `scaled` may be false if grad_scale is 1, which saves the multiplication.
  ADAMOPS_HOST_DEVICE explicit AdamConstants(const AdamScalars& s, bool scaled = true)
      : grad_scale(Ops::set(s.grad_scale)),
        beta1(Ops::set(s.beta1)),
        one_minus_beta1(Ops::set(s.one_minus_beta1)),
        beta2(Ops::set(s.beta2)),
        one_minus_beta2(Ops::set(s.one_minus_beta2)),
        negative_step_size(Ops::set(s.negative_step_size)),
        inverse_sqrt_bias2(Ops::set(s.inverse_sqrt_bias2)),
        eps(Ops::set(s.eps)),
        decay(Ops::set(s.decay)),
        l2(Ops::set(s.l2)),
        scaled(scaled) {}
};

// The first part of adam_update(). Returns the square root of v, or of max_v with Amsgrad. `l2` is a branch rather than
// a factor of 0, because fma(0, param, grad) is not grad for infinite params and negative zeros. Without it, param is
// not used.
template <bool Amsgrad, class Ops, class Number>
ADAMOPS_HOST_DEVICE inline Number adam_update_states(const AdamConstants<Ops>& k, bool l2, Number param, Number grad,
                                                     Number& m, Number& v, Number& max_v) {
  if (k.scaled) grad = Ops::mul(grad, k.grad_scale);
  if (l2) grad = Ops::fma(k.l2, param, grad);
  m = Ops::fma(k.beta1, m, Ops::mul(k.one_minus_beta1, grad));
  v = Ops::fma(k.beta2, v, Ops::mul(Ops::mul(k.one_minus_beta2, grad), grad));
  if (Amsgrad) max_v = Ops::max(max_v, v);
  return Ops::sqrt(Amsgrad ? max_v : v);
}

// The second part, for loops that start on the next elements while the divider computes the square root of these.
template <class Ops, class Number>
ADAMOPS_HOST_DEVICE inline void adam_update_param(const AdamConstants<Ops>& k, Number& param, Number m, Number root) {
  const Number denominator = Ops::fma(root, k.inverse_sqrt_bias2, k.eps);
  param = Ops::fma(k.negative_step_size, Ops::div(m, denominator), Ops::mul(param, k.decay));
}

// One step for one Number of elements. Updates param, exp_avg (m), exp_avg_sq (v) and, with Amsgrad, max_exp_avg_sq in
// place.
template <bool Amsgrad, class Ops, class Number>
ADAMOPS_HOST_DEVICE inline void adam_update(const AdamConstants<Ops>& k, bool l2, Number& param, Number grad, Number& m,
                                            Number& v, Number& max_v) {
  const Number root = adam_update_states<Amsgrad, Ops>(k, l2, param, grad, m, v, max_v);
  adam_update_param<Ops>(k, param, m, root);
}

}  // namespace adamops
