// The kernel, compiled once per SIMD target: Lion on the blocks that adamops walks over memory in.
#include "cpu_lion_kernel.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/vector_blocks.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

template <class T>
void lion_range(const LionTensor& tensor, int64_t begin, int64_t end, const LionScalars& scalars, int prefetch_bytes) {
  const auto update_block = [&scalars](T* param, const T* grad, T* exp_avg) {
    for (int64_t i = 0; i < kVectorBlock; i += Pair::kElements) {
      const Pair g = load_pair(grad + i);
      Pair p = load_pair(param + i), m = load_pair(exp_avg + i);
      lion_update<Ops>(scalars, p.a, g.a, m.a);
      lion_update<Ops>(scalars, p.b, g.b, m.b);
      store_pair(param + i, p);
      store_pair(exp_avg + i, m);
    }
  };
  for_each_block(end - begin, prefetch_bytes, update_block, at<T>(tensor.param, begin), at<T>(tensor.grad, begin),
                 at<T>(tensor.exp_avg, begin));
}

}  // namespace

extern const LionTarget target = {
    ADAMOPS_TARGET_NAME, Ops::kRequires, {lion_range<float>, lion_range<bf16>, lion_range<fp16>}};

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
