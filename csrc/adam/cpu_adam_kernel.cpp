// The CPU kernel: compiled once per SIMD target with that target's flags, into the namespace ADAMOPS_TARGET, on the
// vector wrapper ADAMOPS_SIMD_HEADER. Knows nothing of threads, Python or which target will be chosen.
//
// Nothing here may have external linkage outside the target's namespace, standard library templates included: the
// linker would keep one copy for all targets, perhaps the one that only a newer CPU can run.
#include "cpu_adam_kernel.h"

#include ADAMOPS_SIMD_HEADER

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

constexpr int64_t kCacheLine = 64;

// Elements per round of the main loop: a whole cache line of 16-bit values, two of fp32.
constexpr int64_t kBlock = 32;

// Asks for the cache lines of a block that lies `bytes_ahead` further on; past the end of a tensor that is harmless.
template <class T>
inline void prefetch_block(const T* from, int64_t bytes_ahead) {
  const char* line = reinterpret_cast<const char*>(from) + bytes_ahead;
  for (int64_t offset = 0; offset < kBlock * int64_t{sizeof(T)}; offset += kCacheLine)
    __builtin_prefetch(line + offset);
}

template <class T>
inline T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
inline const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// Two Numbers at a time, in memory order, or the even elements and the odd ones. Which element is in which lane is all
// the same to an element-wise rule, and even and odd bf16 values are a shift and a mask away from fp32, where widening
// them in order takes shuffles.
template <bool EvenOdd, class T>
inline void load_two(const T* from, Ops::Number (&to)[2]) {
  if constexpr (EvenOdd) {
    to[0] = Ops::load_even(from);
    to[1] = Ops::load_odd(from);
  } else {
    to[0] = Ops::load(from);
    to[1] = Ops::load(from + Ops::kWidth);
  }
}
template <bool EvenOdd, class T>
inline void store_two(T* to, const Ops::Number (&from)[2]) {
  if constexpr (EvenOdd) {
    Ops::store_even_odd(to, from[0], from[1]);
  } else {
    Ops::store(to, from[0]);
    Ops::store(to + Ops::kWidth, from[1]);
  }
}

template <class T, class U>
constexpr bool same_type = false;
template <class T>
constexpr bool same_type<T, T> = true;

// One block of kBlock elements. Param, Grad and State are the storage types.
template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad>
inline void update_block(const AdamConstants<Ops>& k, Param* param, const Grad* grad, State* exp_avg, State* exp_avg_sq,
                         State* max_exp_avg_sq, float* master) {
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
      adam_update<L2, Amsgrad, Ops>(k, p[half], g[half], m[half], v[half], max_v[half]);
    store_two<kEvenOdd>(param + i, p);
    if constexpr (Master) store_two<kEvenOdd>(master + i, p);
    store_two<kEvenOdd>(exp_avg + i, m);
    store_two<kEvenOdd>(exp_avg_sq + i, v);
    if constexpr (Amsgrad) store_two<kEvenOdd>(max_exp_avg_sq + i, max_v);
  }
}

// A block's worth of room for the elements that do not fill one: the tail runs through the very same code as the body.
template <class T>
struct Padded {
  T values[kBlock] = {};

  Padded(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
  void write_back(T* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
  }
};

template <class Param, class Grad, class State, bool Master, bool L2, bool Amsgrad>
void adam_range(const AdamTensor& tensor, int64_t begin, int64_t end, const AdamScalars& scalars, int prefetch_bytes) {
  const AdamConstants<Ops> k(scalars);
  Param* param = at<Param>(tensor.param, begin);
  const Grad* grad = at<Grad>(tensor.grad, begin);
  State* exp_avg = at<State>(tensor.exp_avg, begin);
  State* exp_avg_sq = at<State>(tensor.exp_avg_sq, begin);
  State* max_exp_avg_sq = Amsgrad ? at<State>(tensor.max_exp_avg_sq, begin) : nullptr;
  float* master = Master ? at<float>(tensor.master, begin) : nullptr;

  const int64_t count = end - begin, tail = count % kBlock, body = count - tail;
  for (int64_t i = 0; i < body; i += kBlock) {
    prefetch_block(param + i, prefetch_bytes);
    prefetch_block(grad + i, prefetch_bytes);
    prefetch_block(exp_avg + i, prefetch_bytes);
    prefetch_block(exp_avg_sq + i, prefetch_bytes);
    if constexpr (Amsgrad) prefetch_block(max_exp_avg_sq + i, prefetch_bytes);
    if constexpr (Master) prefetch_block(master + i, prefetch_bytes);
    update_block<Param, Grad, State, Master, L2, Amsgrad>(k, param + i, grad + i, exp_avg + i, exp_avg_sq + i,
                                                          Amsgrad ? max_exp_avg_sq + i : nullptr,
                                                          Master ? master + i : nullptr);
  }
  if (tail == 0) return;

  Padded<Param> p(param + body, tail);
  Padded<Grad> g(grad + body, tail);
  Padded<State> m(exp_avg + body, tail), v(exp_avg_sq + body, tail);
  Padded<State> max_v(Amsgrad ? max_exp_avg_sq + body : nullptr, Amsgrad ? tail : 0);
  Padded<float> wide(Master ? master + body : nullptr, Master ? tail : 0);
  update_block<Param, Grad, State, Master, L2, Amsgrad>(k, p.values, g.values, m.values, v.values, max_v.values,
                                                        wide.values);
  p.write_back(param + body, tail);
  m.write_back(exp_avg + body, tail);
  v.write_back(exp_avg_sq + body, tail);
  if (Amsgrad) max_v.write_back(max_exp_avg_sq + body, tail);
  if (Master) wide.write_back(master + body, tail);
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
    if (prefetch_bytes) {
      prefetch_block(param, prefetch_bytes);
      prefetch_block(grad, prefetch_bytes);
      prefetch_block(exp_avg, prefetch_bytes);
      prefetch_block(exp_avg_sq, prefetch_bytes);
    }
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
AdamRange choose_mode(bool l2, bool amsgrad) {
  if (l2)
    return amsgrad ? adam_range<Param, Grad, State, Master, true, true>
                   : adam_range<Param, Grad, State, Master, true, false>;
  return amsgrad ? adam_range<Param, Grad, State, Master, false, true>
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

AdamRange choose_adam_range(AdamDtypes dtypes, bool l2, bool amsgrad) {
  return choose_types<AdamRange>(dtypes, [&](auto p, auto g, auto s) -> AdamRange {
    using Param = decltype(p);
    using Grad = decltype(g);
    using State = decltype(s);
    if (!dtypes.master) return choose_mode<Param, Grad, State, false>(l2, amsgrad);
    if constexpr (!same_type<Param, float> && same_type<State, float>)
      return choose_mode<Param, Grad, State, true>(l2, amsgrad);
    return nullptr;
  });
}

TouchRange choose_touch_range(AdamDtypes dtypes) {
  return choose_types<TouchRange>(
      dtypes, [](auto p, auto g, auto s) -> TouchRange { return touch_range<decltype(p), decltype(g), decltype(s)>; });
}

}  // namespace

#define ADAMOPS_STRING(x) #x
#define ADAMOPS_EXPANDED_STRING(x) ADAMOPS_STRING(x)
// Constant data, so that looking at a target runs none of its code.
extern const AdamTarget target = {ADAMOPS_EXPANDED_STRING(ADAMOPS_TARGET), Ops::kRequires, choose_adam_range,
                                  choose_touch_range};

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
