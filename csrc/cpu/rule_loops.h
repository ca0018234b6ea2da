// What the loops share that run any rule: one member for each state in use, and a variant of a loop for each mode and
// number of states. Included by kernels, which are compiled once per SIMD target, after ADAMOPS_SIMD_HEADER;
// cpu/vector_blocks.h says what that means for linkage.
#pragma once

#include "cpu/kernels.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

// One T for each state. (Members, not an array: GCC would keep that in memory where it is passed on.)
template <int kIndex, class T>
struct StateMember {
  T value;
};
template <class T, class List>
struct StateMembers;
template <class T, int... kIndex>
struct StateMembers<T, IndexList<kIndex...>> : StateMember<kIndex, T>... {};
template <class T, int kStateCount>
using PerState = StateMembers<T, Indices<kStateCount>>;

template <int kIndex, class T>
inline T& of_state(StateMember<kIndex, T>& member) {
  return member.value;
}
template <int kIndex, class T>
inline const T& of_state(const StateMember<kIndex, T>& member) {
  return member.value;
}

// The variant of a loop, Variants::range<mode, number of states>, that the options ask for.
template <class Variants, int... kVariant>
inline StepRange choose_variant(StepOptions options, IndexList<kVariant...>) {
  static constexpr StepRange kRanges[] = {
      Variants::template range<kVariant % Rule::kModes, kLeastStates + kVariant / Rule::kModes>...};
  return kRanges[(options.state_count - kLeastStates) * Rule::kModes + options.mode];
}
template <class Variants>
inline StepRange choose_variant(StepOptions options) {
  return choose_variant<Variants>(options, Indices<(Rule::kOptionalStates + 1) * Rule::kModes>{});
}

}  // namespace
}  // namespace ADAMOPS_TARGET
}  // namespace adamops
