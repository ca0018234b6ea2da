// SignSGD (Bernstein et al., arXiv 1802.04434, Algorithm 1) with decoupled weight decay. It has no states.
#include "rules/rule.h"

namespace adamops {

struct SignSGD : OnePhaseRule<SignSGD> {
  static constexpr StateSpec kStates[kMostStates] = {};
  static constexpr const char* kHyper[] = {"lr", "weight_decay"};
  struct Hyper {
    double lr, weight_decay;
  };

  template <class Ops>
  struct Scalars {
    typename Ops::Number negative_lr, decay;
  };
  template <class Ops>
  ADAMOPS_HOST_DEVICE static Scalars<Floats> scalars(const Hyper& h, int64_t) {
    return {Ops::to_float(-h.lr), Ops::to_float(Ops::sub(1.0, Ops::mul(h.lr, h.weight_decay)))};
  }

  template <class Ops, class Number>
  ADAMOPS_HOST_DEVICE static void update(const Scalars<Ops>& k, Number& param, Number grad, Number*) {
    param = Ops::fma(k.negative_lr, sign<Ops>(grad), Ops::mul(param, k.decay));
  }
};

}  // namespace adamops
