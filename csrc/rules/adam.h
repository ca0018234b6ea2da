// Adam (Kingma & Ba, arXiv 1412.6980, Algorithm 1) and AdamW (Loshchilov & Hutter, arXiv 1711.05101): the only place
// that holds the update, for every backend. Must not know of memory, threads, dtypes or instruction sets: numbers come
// with `Ops`, whose functions each round once (IEEE nearest-even).
#pragma once

#include "rules/rule.h"

namespace adamops {

struct Adam {
  static constexpr StateSpec kStates[kMostStates] = {
      {"exp_avg", kSigned}, {"exp_avg_sq", kUnsigned}, {"max_exp_avg_sq", kUnsigned, kNearest}};
  static constexpr int kOptionalStates = 1;  // max_exp_avg_sq is there with amsgrad

  static constexpr const char* kHyper[] = {"lr",           "beta1",           "beta2",     "eps",
                                           "weight_decay", "bias_correction", "adamw_mode"};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, bias_correction, adamw_mode;  // the last two: 0 or 1
  };

  template <class Ops>
  struct Scalars {
    using Number = typename Ops::Number;
    Number beta1;               // b1
    Number one_minus_beta1;     // c1
    Number beta2;               // b2
    Number one_minus_beta2;     // c2
    Number negative_step_size;  // -a = -lr / (1 - beta1^t)
    Number inverse_sqrt_bias2;  // r = 1 / sqrt(1 - beta2^t)
    Number eps;                 // e
    Number decay;               // w = 1 - lr * weight_decay (AdamW); 1 in L2 mode, which changes no bit
    Number l2;                  // l = weight_decay (L2 mode only)
  };

  // The same arithmetic, operation by operation, as scalars() in adamops/ops/adam/adam.py.
  template <class Ops>
  ADAMOPS_HOST_DEVICE static Scalars<Floats> scalars(const Hyper& h, int64_t step) {
    const double bias1 = h.bias_correction != 0.0 ? Ops::sub(1.0, integer_power<Ops>(h.beta1, step)) : 1.0;
    const double bias2 = h.bias_correction != 0.0 ? Ops::sub(1.0, integer_power<Ops>(h.beta2, step)) : 1.0;
    Scalars<Floats> s;
    s.beta1 = Ops::to_float(h.beta1);
    s.one_minus_beta1 = Ops::to_float(Ops::sub(1.0, h.beta1));
    s.beta2 = Ops::to_float(h.beta2);
    s.one_minus_beta2 = Ops::to_float(Ops::sub(1.0, h.beta2));
    s.negative_step_size = Ops::to_float(Ops::div(-h.lr, bias1));
    s.inverse_sqrt_bias2 = Ops::to_float(Ops::div(1.0, Ops::sqrt(bias2)));
    s.eps = Ops::to_float(h.eps);
    s.decay = h.adamw_mode != 0.0 ? Ops::to_float(Ops::sub(1.0, Ops::mul(h.lr, h.weight_decay))) : 1.0f;
    s.l2 = mode(h) == kL2 ? Ops::to_float(h.weight_decay) : 0.0f;
    return s;
  }

  // L2 is a mode rather than a factor of 0, because fma(0, param, grad) is not grad for infinite params and negative
  // zeros.
  enum Mode { kDecoupled, kL2 };
  static constexpr int kModes = 2;
  ADAMOPS_HOST_DEVICE static int mode(const Hyper& h) {
    return h.adamw_mode == 0.0 && h.weight_decay != 0.0 ? kL2 : kDecoupled;
  }
  static constexpr bool reads_param(int mode) { return mode == kL2; }

  template <class Ops>
  struct Started {
    typename Ops::Number exp_avg, root;
  };

  // The averages, and the square root of exp_avg_sq or, with amsgrad, of its maximum.
  template <int kStateCount, class Ops, class Number>
  ADAMOPS_HOST_DEVICE static Started<Ops> start(const Scalars<Ops>& k, int mode, Number param, Number grad,
                                                Number* state) {
    constexpr bool kAmsgrad = kStateCount == 3;
    Number &m = state[0], &v = state[1];
    if (mode == kL2) grad = Ops::fma(k.l2, param, grad);
    m = Ops::fma(k.beta1, m, Ops::mul(k.one_minus_beta1, grad));
    v = Ops::fma(k.beta2, v, Ops::mul(Ops::mul(k.one_minus_beta2, grad), grad));
    if constexpr (kAmsgrad) state[2] = Ops::max(state[2], v);
    return {m, Ops::sqrt(kAmsgrad ? state[2] : v)};
  }

  // The param, once the divider has the root.
  template <class Ops, class Number>
  ADAMOPS_HOST_DEVICE static void finish(const Scalars<Ops>& k, Number& param, const Started<Ops>& started) {
    const Number denominator = Ops::fma(started.root, k.inverse_sqrt_bias2, k.eps);
    param = Ops::fma(k.negative_step_size, Ops::div(started.exp_avg, denominator), Ops::mul(param, k.decay));
  }
};

}  // namespace adamops
