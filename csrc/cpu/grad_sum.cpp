// Sums of grads in fp32: compiled once per SIMD target, like cpu/direct.cpp, and bit-identical on all targets. Must not
// know of threads or other pieces.
#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/vector_blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

// `former` is a const float*, or a NoColumn for zeros.
template <class T, class Former>
void add(Former former, const T* grad, float* sum, int64_t count) {
  const auto add_block = [](auto before, const T* block, float* to) {
    for (int64_t i = 0; i < kVectorBlock; i += Pair::kElements) {
      Pair x = load_pair(block + i);
      if constexpr (!same_type<Former, NoColumn>) {
        const Pair y = load_pair(before + i);
        x = {y.a + x.a, y.b + x.b};
      }
      store_pair(to + i, x);
    }
  };
  for_each_block(count, 0, add_block, former, grad, sum);
}

template <class T>
void add(const float* former, const T* grad, float* sum, int64_t count) {
  former ? add<T, const float*>(former, grad, sum, count) : add<T, NoColumn>({}, grad, sum, count);
}

}  // namespace

void add_range(const float* former, const void* grad, Dtype dtype, float* sum, int64_t count) {
  if (dtype == kFloat32) return add(former, at<float>(grad, 0), sum, count);
  if (dtype == kBfloat16) return add(former, at<bf16>(grad, 0), sum, count);
  return add(former, at<fp16>(grad, 0), sum, count);
}

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
