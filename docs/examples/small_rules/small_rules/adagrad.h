// Adagrad (Duchi et al., JMLR 12, 2011), with torch.optim.Adagrad's L2 weight decay and decay of the learning rate.
#include "rules/rule.h"

namespace adamops {

struct Adagrad : OnePhaseRule<Adagrad> {
  static constexpr StateSpec kStates[kMostStates] = {{"sum", kUnsigned}};
  static constexpr const char* kHyper[] = {"lr", "lr_decay", "weight_decay", "eps"};
  struct Hyper {
    double lr, lr_decay, weight_decay, eps;
  };

  template <class Ops>
  struct Scalars {
    typename Ops::Number negative_step_size, weight_decay, eps;
  };
  template <class Ops>
  ADAMOPS_HOST_DEVICE static Scalars<Floats> scalars(const Hyper& h, int64_t step) {
    const double slowdown = Ops::add(1.0, Ops::mul(static_cast<double>(step - 1), h.lr_decay));
    return {Ops::to_float(Ops::div(-h.lr, slowdown)), Ops::to_float(h.weight_decay), Ops::to_float(h.eps)};
  }

  template <class Ops, class Number>
  ADAMOPS_HOST_DEVICE static void update(const Scalars<Ops>& k, Number& param, Number grad, Number* state) {
    const Number one = Ops::set(1.0f);
    grad = Ops::fma(k.weight_decay, param, grad);
    state[0] = Ops::fma(grad, grad, state[0]);
    const Number denominator = Ops::fma(Ops::sqrt(state[0]), one, k.eps);
    param = Ops::fma(k.negative_step_size, Ops::div(grad, denominator), param);
  }
};

}  // namespace adamops
