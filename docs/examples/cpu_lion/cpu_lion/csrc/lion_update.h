// Lion's update rule (arXiv 2302.06675, Algorithm 2), for any of adamops' vector wrappers as `Ops`.
#pragma once

// Scalars of one step, computed in double and rounded to float once.
struct LionScalars {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float negative_lr;  // -lr
  float decay;        // 1 - lr * weight_decay
};

// 1, -1, or the zero that it is given; NaN stays NaN. The wrappers have no comparison, but two factors of 2^100 bring
// even the smallest subnormal beyond 1, and zero nowhere; then what is beyond is cut off.
template <class Ops, class Number>
inline Number sign(Number x) {
  const Number large = Ops::set(0x1p100f), minus_one = Ops::set(-1.0f);
  const Number at_least = Ops::max(Ops::mul(Ops::mul(x, large), large), minus_one);
  return Ops::mul(Ops::max(Ops::mul(at_least, minus_one), minus_one), minus_one);
}

// One step for one Number of elements: param and exp_avg (m) are updated in place.
template <class Ops, class Number>
inline void lion_update(const LionScalars& k, Number& param, Number grad, Number& m) {
  const Number update = Ops::fma(Ops::set(k.beta1), m, Ops::mul(Ops::set(k.one_minus_beta1), grad));
  param = Ops::fma(Ops::set(k.negative_lr), sign<Ops>(update), Ops::mul(param, Ops::set(k.decay)));
  m = Ops::fma(Ops::set(k.beta2), m, Ops::mul(Ops::set(k.one_minus_beta2), grad));
}
