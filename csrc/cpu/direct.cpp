// The CPU kernel: compiled once per SIMD target with that target's flags, into the namespace ADAMOPS_TARGET, on the
// vector wrapper ADAMOPS_SIMD_HEADER. Must not know of threads, Python or which target will be chosen. The linkage rule
// of cpu/vector_blocks.h holds here too.
#include <cstring>

#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/average_pairs.h"
#include "cpu/vector_blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {

AdamRange choose_staged_range(AdamDtypes dtypes, AdamMode mode);             // cpu/staged.cpp
double norm_range(const void* grad, Dtype dtype, Norm norm, int64_t count);  // cpu/grad_norm.cpp

namespace {

// The update of a Pair of Numbers, in two phases. Param, Grad and State are storage types; the last two columns may be
// NoColumn.
template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad>
struct PairUpdate {
  static constexpr bool kEvenOdd = same_type<Param, bf16> && same_type<Grad, bf16> && same_type<State, bf16>;

  const AdamConstants<Ops>& k;
  const AverageRounding& rounding;
  bool zero_grads;

  // What the second phase needs from the first.
  struct Started {
    Pair exp_avg, root;
  };

  template <class MaxColumn, class MasterColumn>
  ADAMOPS_INLINE Started start(const Param* param, const Grad* grad, State* exp_avg, State* exp_avg_sq,
                               MaxColumn max_exp_avg_sq, MasterColumn master) const {
    const Pair p = L2 ? load_param(param, master) : Pair{}, g = load_pair<kEvenOdd>(grad);
    Pair m = load_pair<kEvenOdd>(exp_avg), v = load_pair<kEvenOdd>(exp_avg_sq), max_v = {};
    if constexpr (Amsgrad) max_v = load_pair<kEvenOdd>(max_exp_avg_sq);
    const Pair root = {adam_update_states<Amsgrad, Ops>(k, L2, p.a, g.a, m.a, v.a, max_v.a),
                       adam_update_states<Amsgrad, Ops>(k, L2, p.b, g.b, m.b, v.b, max_v.b)};
    rounding.template store<SignedFormat, kEvenOdd>(exp_avg, m);
    rounding.template store<UnsignedFormat, kEvenOdd>(exp_avg_sq, v);
    if constexpr (Amsgrad) store_pair<kEvenOdd>(max_exp_avg_sq, max_v);
    if (zero_grads) zero(grad, Pair::kElements);
    return {m, root};
  }

  template <class MaxColumn, class MasterColumn>
  ADAMOPS_INLINE void finish(const Started& started, Param* param, const Grad*, State*, State*, MaxColumn,
                             MasterColumn master) const {
    Pair p = load_param(param, master);
    adam_update_param<Ops>(k, p.a, started.exp_avg.a, started.root.a);
    adam_update_param<Ops>(k, p.b, started.exp_avg.b, started.root.b);
    store_pair<kEvenOdd>(param, p);
    if constexpr (Master) store_pair<kEvenOdd>(master, p);
  }

  // Zeroes grads in the tensor's own memory, or in a padded copy.
  static void zero(const Grad* grad, int64_t count) {
    std::memset(static_cast<void*>(const_cast<Grad*>(grad)), 0, static_cast<size_t>(count) * sizeof(Grad));
  }

 private:
  template <class MasterColumn>
  ADAMOPS_INLINE static Pair load_param(const Param* param, MasterColumn master) {
    if constexpr (Master)
      return load_pair<kEvenOdd>(master);
    else
      return load_pair<kEvenOdd>(param);
  }
};

template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad>
void adam_range(const AdamTensor& tensor, const AdamWork& work, int64_t begin, int64_t end) {
  const AdamConstants<Ops> k(work.scalars, work.scalars.grad_scale != 1.0f);
  const AverageRounding rounding(work.scalars.step);
  const PairUpdate<Param, Grad, State, Master, L2, Amsgrad> update = {k, rounding, work.mode.zero_grads};
  const Grad* const grad = at<Grad>(tensor.grad, begin);  // const, or every step would write back the tail
  const int64_t count = end - begin, tail = count % Pair::kElements;
  for_each_pair(count, work.prefetch_bytes, update, at<Param>(tensor.param, begin), grad,
                at<State>(tensor.exp_avg, begin), at<State>(tensor.exp_avg_sq, begin),
                at_if<Amsgrad, State>(tensor.max_exp_avg_sq, begin), at_if<Master, float>(tensor.master, begin));
  if (update.zero_grads) update.zero(grad + count - tail, tail);
}

// Loads every byte that adam_range moves and stores it unchanged.
template <class Param, class Grad, class State>
void probe_range(const AdamTensor& tensor, int64_t begin, int64_t end, int prefetch_bytes) {
  using Word = uint64_t;
  constexpr int64_t kParamWords = kVectorBlock * sizeof(Param) / sizeof(Word),
                    kGradWords = kVectorBlock * sizeof(Grad) / sizeof(Word);
  constexpr int64_t kStateWords = kVectorBlock * sizeof(State) / sizeof(Word);
  const Word zero = prefetch_bytes < 0;  // 0, but the compiler does not know
  for (int64_t i = begin; i + kVectorBlock <= end; i += kVectorBlock) {
    Param* param = at<Param>(tensor.param, i);
    const Grad* grad = at<Grad>(tensor.grad, i);
    State* exp_avg = at<State>(tensor.exp_avg, i);
    State* exp_avg_sq = at<State>(tensor.exp_avg_sq, i);
    prefetch_block(param, prefetch_bytes);
    prefetch_block(grad, prefetch_bytes);
    prefetch_block(exp_avg, prefetch_bytes);
    prefetch_block(exp_avg_sq, prefetch_bytes);
    Word* __restrict p = reinterpret_cast<Word*>(param);
    const Word* __restrict g = reinterpret_cast<const Word*>(grad);
    Word* __restrict m = reinterpret_cast<Word*>(exp_avg);
    Word* __restrict v = reinterpret_cast<Word*>(exp_avg_sq);
    for (int64_t w = 0; w < kParamWords; ++w) p[w] ^= g[w] & zero;
    for (int64_t w = kParamWords; w < kGradWords; ++w) p[w - kParamWords] ^= g[w] & zero;
    for (int64_t w = 0; w < kStateWords; ++w) m[w] ^= zero;
    for (int64_t w = 0; w < kStateWords; ++w) v[w] ^= zero;
  }
}

template <class Param, class Grad, class State, bool Master>
AdamRange choose_mode(AdamMode mode) {
  if (mode.l2)
    return mode.amsgrad ? adam_range<Param, Grad, State, Master, true, true>
                        : adam_range<Param, Grad, State, Master, true, false>;
  return mode.amsgrad ? adam_range<Param, Grad, State, Master, false, true>
                      : adam_range<Param, Grad, State, Master, false, false>;
}

// Calls `visit` with a value of each storage type and returns its result; null if the combination does not exist.
template <class Result, class Visit>
Result choose_types(AdamDtypes dtypes, Visit visit) {
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
AdamRange choose_direct_range(AdamDtypes dtypes, AdamMode mode) {
  return choose_types<AdamRange>(dtypes, [&](auto p, auto g, auto s) -> AdamRange {
    using Param = decltype(p);
    using Grad = decltype(g);
    using State = decltype(s);
    if (dtypes.master == kNoMaster) return choose_mode<Param, Grad, State, false>(mode);
    if constexpr (!same_type<Param, float> && same_type<State, float>)
      if (dtypes.master == kMasterFp32) return choose_mode<Param, Grad, State, true>(mode);
    return nullptr;
  });
}

AdamRange choose_adam_range(AdamDtypes dtypes, AdamMode mode, bool in_blocks) {
  const AdamRange direct = in_blocks || mode.stochastic_rounding ? nullptr : choose_direct_range(dtypes, mode);
  return direct ? direct : choose_staged_range(dtypes, mode);
}

ProbeRange choose_probe_range(AdamDtypes dtypes) {
  return choose_types<ProbeRange>(
      dtypes, [](auto p, auto g, auto s) -> ProbeRange { return probe_range<decltype(p), decltype(g), decltype(s)>; });
}

}  // namespace

// Constant data, so that inspecting a target runs none of its code.
extern const AdamTarget target = {ADAMOPS_TARGET_NAME, Ops::kRequires, choose_adam_range, choose_probe_range,
                                  norm_range};

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
