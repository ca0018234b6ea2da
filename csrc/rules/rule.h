// What a rule is: all that makes an optimizer that optimizer, as the loops (cpu/), the kernels (cuda/) and the modules
// (python/) take it. Must not know of memory, threads, dtypes or instruction sets, and no more may a rule.
//
// A rule is a struct with these members. The engine is compiled for one of them (selected.h).
//
//   kStates                the states of a param, in order
//   kHyper, Hyper          the hyper-parameters of a param group: names, and as many doubles. One of them is `lr`
//   Scalars<Ops>           the scalars of a step: nothing but members of Ops::Number
//   scalars<Ops>(hyper, t) computes them, in double, rounded to float once; t is the step count, from 1
//   update<Ops>(k, param, grad, state)
//                          updates one Number of elements: `param` and the numbers that `state` points to. `k` are
//                          Scalars<Ops>. The engine has multiplied `grad` by the inverse loss scale and the clip factor
//
// A rule derives from OnePhaseRule, which has the rest, unless it splits its update in two (adam.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace adamops {

constexpr int kMostStates = 3;  // of a rule

enum Sign : uint8_t { kSigned, kUnsigned };
// How a state is rounded to bfloat16: moving averages and sums, whose changes may be less than half an ulp, with noise
// that cancels over the steps (formats/average_rounding.h).
enum StateRounding : uint8_t { kAverage, kNearest };

struct StateSpec {
  const char* name = nullptr;  // null: there is no such state
  Sign sign = kSigned;
  StateRounding rounding = kAverage;
};

// A float as the number of an Ops.
struct Floats {
  using Number = float;
};

// The part of a rule that one with a single update() has no need to write.
template <class Rule>
struct OnePhaseRule {
  // How many of the last states a param group may do without.
  static constexpr int kOptionalStates = 0;

  // A rule may have modes, variants that hyper-parameters select. Loops on the CPU are compiled for each.
  static constexpr int kModes = 1;
  template <class Hyper>
  static int mode(const Hyper&) {
    return 0;
  }
  static constexpr bool reads_param(int) { return true; }  // whether start() needs the param

  // Loops call start() for the next elements before they call finish() for these, so that slow operations overlap.
  template <class Ops>
  struct Started {
    typename Ops::Number param;
  };
  template <int kStateCount, class Ops, class Scalars, class Number>
  ADAMOPS_HOST_DEVICE static Started<Ops> start(const Scalars& k, int, Number param, Number grad, Number* state) {
    Rule::template update<Ops>(k, param, grad, state);
    return {param};
  }
  template <class Ops, class Scalars, class Number>
  ADAMOPS_HOST_DEVICE static void finish(const Scalars&, Number& param, const Started<Ops>& started) {
    param = started.param;
  }
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

// 1, -1, or the zero that it is given; NaN stays NaN. Ops have no comparison, but two factors of 2^100 bring even the
// smallest subnormal beyond 1, and zero nowhere; then what is beyond is cut off.
template <class Ops, class Number>
ADAMOPS_HOST_DEVICE inline Number sign(const Number& x) {
  const Number large = Ops::set(0x1p100f), minus_one = Ops::set(-1.0f);
  const Number at_least = Ops::max(Ops::mul(Ops::mul(x, large), large), minus_one);
  return Ops::mul(Ops::max(Ops::mul(at_least, minus_one), minus_one), minus_one);
}

}  // namespace adamops
