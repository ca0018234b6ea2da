// Test only: one SIMD target of the CPU kernel as a program, for CPUs that have no Python here. Reads cases from
// standard input until it ends, and writes the arrays of each after one step to standard output.
//
// A case is a Header, ten floats of scalars, and the arrays: param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "adam/cpu_adam_kernel.h"

namespace adamops {
namespace ADAMOPS_TARGET {
extern const AdamTarget target;
}
}  // namespace adamops

namespace {

struct Header {
  uint8_t param, grad, state, has_master, l2, amsgrad, unused[2];
  uint32_t numel, offset;  // the arrays begin `offset` elements into their memory
};

bool read(void* to, size_t bytes) {
  return std::fread(to, 1, bytes, stdin) == bytes;
}

}  // namespace

int main() {
  using namespace adamops;
  Header header;
  AdamScalars scalars;
  constexpr size_t kFloats = offsetof(AdamScalars, step);
  static_assert(kFloats == 40, "ten floats");
  while (read(&header, sizeof header)) {
    if (!read(&scalars, kFloats)) return 2;
    scalars.step = 1;
    const auto dtype = [](uint8_t code) { return static_cast<Dtype>(code); };
    const size_t codes[] = {header.param, header.grad, header.state, header.state, header.state, kFloat32};
    std::vector<std::vector<char>> arrays;
    std::vector<char*> starts;
    for (const size_t code : codes) {
      const size_t size = code == kFloat32 ? 4 : 2;
      arrays.emplace_back((header.numel + header.offset) * size + 1);  // never empty
      starts.push_back(arrays.back().data() + header.offset * size);
      if (!read(starts.back(), header.numel * size)) return 2;
    }
    const AdamWork work = {{dtype(header.param), dtype(header.grad), dtype(header.state),
                            header.has_master ? kMasterFp32 : kNoMaster, kFloat32},
                           {header.l2 != 0, header.amsgrad != 0, false, false},
                           scalars,
                           256};
    const AdamRange range = ADAMOPS_TARGET::target.adam_range(work.dtypes, work.mode, false);
    if (!range) return 3;
    const AdamTensor tensor = {starts[0], starts[1], starts[2],
                               starts[3], starts[4], starts[5],
                               nullptr,   nullptr,   static_cast<int64_t>(header.numel),
                               0};
    range(tensor, work, 0, tensor.numel);
    for (size_t i = 0; i < arrays.size(); ++i) {
      const size_t bytes = header.numel * (codes[i] == kFloat32 ? 4 : 2);
      if (std::fwrite(starts[i], 1, bytes, stdout) != bytes) return 4;
    }
  }
  return 0;
}
