// The rule that an op is compiled for. Its builder defines ADAMOPS_RULE_HEADER, the header without quotes, which shells
// would need escaped, and ADAMOPS_RULE, the struct in it. What the engine derives from any rule is here too.
#pragma once

#include <utility>

#include "rules/rule.h"

#define ADAMOPS_QUOTED(x) #x
#define ADAMOPS_EXPANDED_AND_QUOTED(x) ADAMOPS_QUOTED(x)
#include ADAMOPS_EXPANDED_AND_QUOTED(ADAMOPS_RULE_HEADER)

namespace adamops {

using Rule = ADAMOPS_RULE;

constexpr int kHyperCount = sizeof(Rule::kHyper) / sizeof(Rule::kHyper[0]);
static_assert(sizeof(Rule::Hyper) == kHyperCount * sizeof(double), "kHyper names each member of Hyper, all doubles");
constexpr int kScalarCount = sizeof(Rule::Scalars<Floats>) / sizeof(float);

// The scalars of one step.
struct StepScalars {
  float grad_scale;  // a factor for every gradient; a negative one maximizes, and 1 changes no bit
  Rule::Scalars<Floats> rule;
  uint32_t step;  // t, for rounding noise; counted by the op, not by its caller
};
static_assert(sizeof(StepScalars) == (kScalarCount + 2) * sizeof(float), "scalars are nothing but floats");

namespace {  // included by code that is compiled for several CPUs: cpu/vector_blocks.h says why

constexpr int count_states() {
  int count = 0;
  while (count < kMostStates && Rule::kStates[count].name) ++count;
  return count;
}
// 0, 1, ..., kCount - 1 at compile time: one member or argument for each state.
template <int... kIndex>
using IndexList = std::integer_sequence<int, kIndex...>;
template <int kCount>
using Indices = std::make_integer_sequence<int, kCount>;

constexpr int kStatesOfRule = count_states(), kLeastStates = kStatesOfRule - Rule::kOptionalStates;

// `loss_scale` is what the loss was multiplied by; `grad_factor` is a further factor for grads.
template <class Ops>
ADAMOPS_HOST_DEVICE inline float grad_scale(bool maximize, double loss_scale, double grad_factor) {
  return Ops::to_float(Ops::mul(Ops::div(maximize ? -1.0 : 1.0, loss_scale), grad_factor));
}

// The scalars as numbers of the backend (vectors with equal lanes, or plain floats), made once per range of elements.
template <class Ops>
class Constants {
 public:
  using Number = typename Ops::Number;

  // Always multiplying by grad_scale, even if it is 1, saves a branch.
  ADAMOPS_HOST_DEVICE explicit Constants(const StepScalars& s, bool always_scale = false)
      : rule(broadcast(reinterpret_cast<const float*>(&s.rule), Indices<kScalarCount>{})),
        grad_scale_(Ops::set(s.grad_scale)),
        is_scaled_(always_scale || s.grad_scale != 1.0f) {}

  ADAMOPS_HOST_DEVICE Number scaled(const Number& grad) const {
    return is_scaled_ ? Ops::mul(grad, grad_scale_) : grad;
  }

  Rule::Scalars<Ops> rule;

 private:
  template <int... kIndex>
  ADAMOPS_HOST_DEVICE static Rule::Scalars<Ops> broadcast(const float* scalars, IndexList<kIndex...>) {
    return {Ops::set(scalars[kIndex])...};
  }

  Number grad_scale_;
  bool is_scaled_;
};

}  // namespace
}  // namespace adamops
