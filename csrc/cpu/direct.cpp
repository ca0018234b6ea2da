// The CPU kernel: compiled once per SIMD target with that target's flags, into the namespace ADAMOPS_TARGET, on the
// vector wrapper ADAMOPS_SIMD_HEADER. Must not know of threads, Python or which target will be chosen. The linkage rule
// of cpu/vector_blocks.h holds here too.
#include <cstring>

#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/average_pairs.h"
#include "cpu/rule_loops.h"
#include "cpu/vector_blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {

StepRange choose_staged_range(Dtypes dtypes, StepOptions options);                              // cpu/staged.cpp
double norm_range(const void* grad, Dtype dtype, Norm norm, int64_t count);                     // cpu/grad_norm.cpp
void add_range(const float* former, const void* grad, Dtype dtype, float* sum, int64_t count);  // cpu/grad_sum.cpp

namespace {

// The update of a Pair of Numbers, in two phases. Param, Grad and State are storage types; the master column may be a
// NoColumn.
template <class Param, class Grad, class State, bool kMaster, int kMode, int kStateCount>
struct PairUpdate {
  static constexpr bool kEvenOdd = same_type<Param, bf16> && same_type<Grad, bf16> && same_type<State, bf16>;
  using Number = Ops::Number;

  const Constants<Ops>& k;
  const AverageRounding& rounding;
  bool zero_grads;

  // What the second phase needs from the first.
  struct Started {
    Rule::Started<Ops> a, b;
  };

  template <class MasterColumn, class... States>
  ADAMOPS_INLINE Started start(const Param* param, const Grad* grad, MasterColumn master, States... states) const {
    return start(Indices<kStateCount>{}, param, grad, master, states...);
  }

  template <class MasterColumn, class... States>
  ADAMOPS_INLINE void finish(const Started& started, Param* param, const Grad*, MasterColumn master, States...) const {
    Pair p = load_param(param, master);
    Rule::finish<Ops>(k.rule, p.a, started.a);
    Rule::finish<Ops>(k.rule, p.b, started.b);
    store_pair<kEvenOdd>(param, p);
    if constexpr (kMaster) store_pair<kEvenOdd>(master, p);
  }

  // Zeroes grads in the tensor's own memory, or in a padded copy.
  static void zero(const Grad* grad, int64_t count) {
    std::memset(static_cast<void*>(const_cast<Grad*>(grad)), 0, static_cast<size_t>(count) * sizeof(Grad));
  }

 private:
  template <int... kIndex, class MasterColumn, class... States>
  ADAMOPS_INLINE Started start(IndexList<kIndex...>, const Param* param, const Grad* grad, MasterColumn master,
                               States... states) const {
    const Pair p = Rule::reads_param(kMode) ? load_param(param, master) : Pair{}, g = load_pair<kEvenOdd>(grad);
    [[maybe_unused]] const PerState<Pair, kStateCount> loaded = {{load_pair<kEvenOdd>(states)}...};
    Number a[kMostStates] = {of_state<kIndex>(loaded).a...}, b[kMostStates] = {of_state<kIndex>(loaded).b...};
    const Started started = {Rule::start<kStateCount, Ops>(k.rule, kMode, p.a, k.scaled(g.a), a),
                             Rule::start<kStateCount, Ops>(k.rule, kMode, p.b, k.scaled(g.b), b)};
    (rounding.template store_state<kIndex, kEvenOdd>(states, Pair{a[kIndex], b[kIndex]}), ...);
    if (zero_grads) zero(grad, Pair::kElements);
    return started;
  }

  template <class MasterColumn>
  ADAMOPS_INLINE static Pair load_param(const Param* param, MasterColumn master) {
    if constexpr (kMaster)
      return load_pair<kEvenOdd>(master);
    else
      return load_pair<kEvenOdd>(param);
  }
};

template <class Param, class Grad, class State, bool kMaster, int kMode, int kStateCount, int... kIndex>
ADAMOPS_INLINE void direct_range(IndexList<kIndex...>, const Tensor& tensor, const Work& work, int64_t begin,
                                 int64_t end) {
  const Constants<Ops> k(work.scalars);
  const AverageRounding rounding(work.scalars.step);
  const PairUpdate<Param, Grad, State, kMaster, kMode, kStateCount> update = {k, rounding, work.options.zero_grads};
  const Grad* const grad = at<Grad>(tensor.grad, begin);  // const, or every step would write back the tail
  const int64_t count = end - begin, tail = count % Pair::kElements;
  for_each_pair(count, work.prefetch_bytes, update, at<Param>(tensor.param, begin), grad,
                at_if<kMaster, float>(tensor.master, begin), at<State>(tensor.states[kIndex], begin)...);
  if (update.zero_grads) update.zero(grad + count - tail, tail);
}
template <class Param, class Grad, class State, bool kMaster>
struct DirectVariants {
  template <int kMode, int kStateCount>
  static void range(const Tensor& tensor, const Work& work, int64_t begin, int64_t end) {
    direct_range<Param, Grad, State, kMaster, kMode, kStateCount>(Indices<kStateCount>{}, tensor, work, begin, end);
  }
};

// Loads every byte that direct_range moves, with the fewest states, and stores it unchanged.
template <class Param, class Grad, class State>
void probe_range(const Tensor& tensor, int64_t begin, int64_t end, int prefetch_bytes) {
  using Word = uint64_t;
  constexpr int64_t kParamWords = kVectorBlock * sizeof(Param) / sizeof(Word),
                    kGradWords = kVectorBlock * sizeof(Grad) / sizeof(Word),
                    kStateWords = kVectorBlock * sizeof(State) / sizeof(Word);
  const Word zero = prefetch_bytes < 0;  // 0, but the compiler does not know
  for (int64_t i = begin; i + kVectorBlock <= end; i += kVectorBlock) {
    Param* param = at<Param>(tensor.param, i);
    const Grad* grad = at<Grad>(tensor.grad, i);
    prefetch_block(param, prefetch_bytes);
    prefetch_block(grad, prefetch_bytes);
    for (int s = 0; s < kLeastStates; ++s) prefetch_block(at<State>(tensor.states[s], i), prefetch_bytes);
    Word* __restrict p = reinterpret_cast<Word*>(param);
    const Word* __restrict g = reinterpret_cast<const Word*>(grad);
    for (int64_t w = 0; w < kParamWords; ++w) p[w] ^= w < kGradWords ? g[w] & zero : zero;
    for (int64_t w = kParamWords; w < kGradWords; ++w) p[w - kParamWords] ^= g[w] & zero;
    for (int s = 0; s < kLeastStates; ++s) {
      Word* __restrict state = reinterpret_cast<Word*>(at<State>(tensor.states[s], i));
      for (int64_t w = 0; w < kStateWords; ++w) state[w] ^= zero;
    }
  }
}

// Calls `visit` with a value of each storage type and returns its result; null if the combination does not exist.
template <class Result, class Visit>
Result choose_types(Dtypes dtypes, Visit visit) {
  if (dtypes.param == kFloat32) {
    return dtypes.grad == kFloat32 && dtypes.state == kFloat32 ? visit(float{}, float{}, float{}) : nullptr;
  }
  const auto choose_16 = [&](auto p) -> Result {
    const bool grad_fp32 = dtypes.grad == kFloat32, state_fp32 = dtypes.state == kFloat32;
    if ((!grad_fp32 && dtypes.grad != dtypes.param) || (!state_fp32 && dtypes.state != dtypes.param)) return nullptr;
    if (grad_fp32) return state_fp32 ? visit(p, float{}, float{}) : visit(p, float{}, p);
    return state_fp32 ? visit(p, p, float{}) : visit(p, p, p);
  };
  return dtypes.param == kBfloat16 ? choose_16(bf16{}) : choose_16(fp16{});
}

// The kernels with one pass over registers, for the most common cases; null for everything else.
StepRange choose_direct_range(Dtypes dtypes, StepOptions options) {
  return choose_types<StepRange>(dtypes, [&](auto p, auto g, auto s) -> StepRange {
    using Param = decltype(p);
    using Grad = decltype(g);
    using State = decltype(s);
    if (dtypes.master == kNoMaster) return choose_variant<DirectVariants<Param, Grad, State, false>>(options);
    if constexpr (!same_type<Param, float> && same_type<State, float>)
      if (dtypes.master == kMasterFp32) return choose_variant<DirectVariants<Param, Grad, State, true>>(options);
    return nullptr;
  });
}

StepRange choose_step_range(Dtypes dtypes, StepOptions options, bool in_blocks) {
  const StepRange direct = in_blocks || options.stochastic_rounding ? nullptr : choose_direct_range(dtypes, options);
  return direct ? direct : choose_staged_range(dtypes, options);
}

ProbeRange choose_probe_range(Dtypes dtypes) {
  const bool widens = dtypes.param == kFloat32 && dtypes.grad != kFloat32;  // 16 bits are 16 bits
  if (widens && dtypes.state == kFloat32) return probe_range<float, bf16, float>;
  return choose_types<ProbeRange>(
      dtypes, [](auto p, auto g, auto s) -> ProbeRange { return probe_range<decltype(p), decltype(g), decltype(s)>; });
}

}  // namespace

// Constant data, so that inspecting a target runs none of its code.
extern const Target target = {ADAMOPS_TARGET_NAME, Ops::kRequires, choose_step_range,
                              choose_probe_range,  norm_range,     add_range};

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
