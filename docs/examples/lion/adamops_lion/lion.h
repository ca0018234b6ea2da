// Lion (Chen et al., arXiv 2302.06675, Algorithm 2).
#include "rules/rule.h"

namespace adamops {

struct Lion : OnePhaseRule<Lion> {
  static constexpr StateSpec kStates[kMostStates] = {{"exp_avg", kSigned}};
  static constexpr const char* kHyper[] = {"lr", "beta1", "beta2", "weight_decay"};
  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };

  template <class Ops>
  struct Scalars {
    typename Ops::Number beta1, one_minus_beta1, beta2, one_minus_beta2, negative_lr, decay;
  };
  template <class Ops>
  ADAMOPS_HOST_DEVICE static Scalars<Floats> scalars(const Hyper& h, int64_t) {
    const double decay = Ops::sub(1.0, Ops::mul(h.lr, h.weight_decay));
    return {Ops::to_float(h.beta1), Ops::to_float(Ops::sub(1.0, h.beta1)),
            Ops::to_float(h.beta2), Ops::to_float(Ops::sub(1.0, h.beta2)),
            Ops::to_float(-h.lr),   Ops::to_float(decay)};
  }

  template <class Ops, class Number>
  ADAMOPS_HOST_DEVICE static void update(const Scalars<Ops>& k, Number& param, Number grad, Number* state) {
    const Number direction = sign<Ops>(Ops::fma(k.beta1, state[0], Ops::mul(k.one_minus_beta1, grad)));
    param = Ops::fma(k.negative_lr, direction, Ops::mul(param, k.decay));
    state[0] = Ops::fma(k.beta2, state[0], Ops::mul(k.one_minus_beta2, grad));
  }
};

}  // namespace adamops
