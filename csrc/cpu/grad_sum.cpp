// Sums of grads in fp32: compiled once per SIMD target, like cpu/direct.cpp, and bit-identical on all targets. Must not
// know of threads or other pieces.
#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/vector_blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

template <bool kIsFirst, class T>
void add(float* sum, const T* grad, int64_t count) {
  const auto add_block = [](float* to, const T* block) {
    for (int64_t i = 0; i < kVectorBlock; i += Pair::kElements) {
      Pair x = load_pair(block + i);
      if constexpr (!kIsFirst) {
        const Pair before = load_pair(to + i);
        x = {before.a + x.a, before.b + x.b};
      }
      store_pair(to + i, x);
    }
  };
  for_each_block(count, 0, add_block, sum, grad);
}

template <class T>
void add(float* sum, const T* grad, bool is_first, int64_t count) {
  is_first ? add<true>(sum, grad, count) : add<false>(sum, grad, count);
}

}  // namespace

void add_range(float* sum, const void* grad, Dtype dtype, bool is_first, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  if (dtype == kFloat32) return add(sum + begin, at<float>(grad, begin), is_first, count);
  if (dtype == kBfloat16) return add(sum + begin, at<bf16>(grad, begin), is_first, count);
  return add(sum + begin, at<fp16>(grad, begin), is_first, count);
}

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
