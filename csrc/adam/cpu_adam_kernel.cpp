// The CPU kernel: compiled once per SIMD target with that target's flags, into the namespace ADAMOPS_TARGET, on the
// vector wrapper ADAMOPS_SIMD_HEADER. Knows nothing of threads, Python or which target will be chosen.
// What ../simd/blocks.h says of linkage holds here too.
#include "cpu_adam_kernel.h"

#include <cstring>

#include ADAMOPS_SIMD_HEADER

#include "../simd/blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {

AdamRange choose_staged_range(AdamDtypes dtypes, AdamMode mode);             // cpu_adam_staged.cpp
double norm_range(const void* grad, Dtype dtype, Norm norm, int64_t count);  // grad_norm_kernel.cpp

namespace {

// One block of kBlock elements. Param, Grad and State are the storage types; the last two columns may be NoColumn.
template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad, class MaxColumn, class MasterColumn>
inline void update_block(const AdamConstants<Ops>& k, Param* param, const Grad* grad, State* exp_avg, State* exp_avg_sq,
                         MaxColumn max_exp_avg_sq, MasterColumn master) {
  constexpr bool kEvenOdd = same_type<Param, bf16> && same_type<Grad, bf16> && same_type<State, bf16>;
  for (int64_t i = 0; i < kBlock; i += 2 * Ops::kWidth) {
    Ops::Number p[2], g[2], m[2], v[2], max_v[2] = {};
    if constexpr (Master)
      load_two<kEvenOdd>(master + i, p);
    else
      load_two<kEvenOdd>(param + i, p);
    load_two<kEvenOdd>(grad + i, g);
    load_two<kEvenOdd>(exp_avg + i, m);
    load_two<kEvenOdd>(exp_avg_sq + i, v);
    if constexpr (Amsgrad) load_two<kEvenOdd>(max_exp_avg_sq + i, max_v);
    for (int half = 0; half < 2; ++half)
      adam_update<Amsgrad, Ops>(k, L2, p[half], g[half], m[half], v[half], max_v[half]);
    store_two<kEvenOdd>(param + i, p);
    if constexpr (Master) store_two<kEvenOdd>(master + i, p);
    store_two<kEvenOdd>(exp_avg + i, m);
    store_two<kEvenOdd>(exp_avg_sq + i, v);
    if constexpr (Amsgrad) store_two<kEvenOdd>(max_exp_avg_sq + i, max_v);
  }
}

template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad>
void adam_range(const AdamTensor& tensor, const AdamWork& work, int64_t begin, int64_t end) {
  const AdamConstants<Ops> k(work.scalars);
  const bool zero_grads = work.mode.zero_grads;
  const auto zero = [](const Grad* grad, int64_t count) {  // of a tensor's own memory, or of a copy
    std::memset(static_cast<void*>(const_cast<Grad*>(grad)), 0, static_cast<size_t>(count) * sizeof(Grad));
  };
  const auto update = [&](Param* param, const Grad* grad, auto... columns) {
    update_block<Param, Grad, State, Master, L2, Amsgrad>(k, param, grad, columns...);
    if (zero_grads) zero(grad, kBlock);
  };
  const Grad* const grad = at<Grad>(tensor.grad, begin);  // not a column to be written, or all steps would write tails
  const int64_t count = end - begin, tail = count % kBlock;
  for_each_block(count, work.prefetch_bytes, update, at<Param>(tensor.param, begin), grad,
                 at<State>(tensor.exp_avg, begin), at<State>(tensor.exp_avg_sq, begin),
                 at_if<Amsgrad, State>(tensor.max_exp_avg_sq, begin), at_if<Master, float>(tensor.master, begin));
  if (zero_grads) zero(grad + count - tail, tail);
}

// Every byte that adam_range moves is loaded, changed by one exclusive or, and stored.
template <class Param, class Grad, class State>
void touch_range(const AdamTensor& tensor, int64_t begin, int64_t end, int prefetch_bytes) {
  using Word = uint64_t;
  constexpr int64_t kParamWords = kBlock * sizeof(Param) / sizeof(Word),
                    kGradWords = kBlock * sizeof(Grad) / sizeof(Word);
  constexpr int64_t kStateWords = kBlock * sizeof(State) / sizeof(Word);
  const Word change = static_cast<Word>(prefetch_bytes);
  for (int64_t i = begin; i + kBlock <= end; i += kBlock) {
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
    for (int64_t w = 0; w < kParamWords; ++w) p[w] ^= g[w];
    for (int64_t w = kParamWords; w < kGradWords; ++w) p[w - kParamWords] ^= g[w];
    for (int64_t w = 0; w < kStateWords; ++w) m[w] ^= change;
    for (int64_t w = 0; w < kStateWords; ++w) v[w] ^= change;
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

// Calls `visit` with a value of each storage type, and returns what it returns; null where the combination does not
// exist.
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

// The kernels of one pass over registers, for what is most common; null for everything else.
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

TouchRange choose_touch_range(AdamDtypes dtypes) {
  return choose_types<TouchRange>(
      dtypes, [](auto p, auto g, auto s) -> TouchRange { return touch_range<decltype(p), decltype(g), decltype(s)>; });
}

}  // namespace

// Constant data, so that looking at a target runs none of its code.
extern const AdamTarget target = {ADAMOPS_TARGET_NAME, Ops::kRequires, choose_adam_range, choose_touch_range,
                                  norm_range};

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
