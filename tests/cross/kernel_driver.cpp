// Test only: one SIMD target of the CPU kernel as a program, for CPUs that have no Python here. Reads cases from
// standard input until it ends, and writes to standard output, of each, the norms of its grad and its arrays after one
// step.
//
// A case is a Header, ten floats of scalars, and the columns of a Tensor in order, each with its size before it.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace adamops {
namespace ADAMOPS_TARGET {
extern const Target target;
}
}  // namespace adamops

namespace {

struct Header {
  uint8_t param, grad, state, master, lowp_out, l2, amsgrad, zero_grads, stochastic_rounding, unused[3];
  uint32_t numel, rng_offset;
};
struct Size {
  uint32_t bytes, skip;  // the column begins `skip` bytes into its memory; 0 bytes: there is none
};
constexpr size_t kColumns = 8;

bool read(void* to, size_t bytes) {
  return std::fread(to, 1, bytes, stdin) == bytes;
}

}  // namespace

int main() {
  using namespace adamops;
  Header header;
  StepScalars scalars;
  constexpr size_t kFloats = offsetof(StepScalars, step);
  static_assert(kFloats == 40, "ten floats");
  while (read(&header, sizeof header)) {
    if (!read(&scalars, kFloats)) return 2;
    scalars.step = 1;
    const auto dtype = [](uint8_t code) { return static_cast<Dtype>(code); };
    std::vector<std::vector<char>> memory(kColumns);
    Size sizes[kColumns];
    char* columns[kColumns];
    for (size_t i = 0; i < kColumns; ++i) {
      if (!read(sizes + i, sizeof(Size))) return 2;
      memory[i].resize(sizes[i].skip + sizes[i].bytes);
      columns[i] = sizes[i].bytes ? memory[i].data() + sizes[i].skip : nullptr;
      if (!read(columns[i], sizes[i].bytes)) return 2;
    }
    const Work work = {{dtype(header.param), dtype(header.grad), dtype(header.state),
                        static_cast<Master>(header.master), dtype(header.lowp_out)},
                       {static_cast<uint8_t>(header.amsgrad ? 3 : 2), header.l2, header.zero_grads != 0,
                        header.stochastic_rounding != 0},
                       scalars,
                       256};
    const StepRange range = ADAMOPS_TARGET::target.step_range(work.dtypes, work.options, columns[7]);
    if (!range) return 3;
    const Tensor tensor = {columns[0],
                           columns[1],
                           {columns[2], columns[3], columns[4]},
                           columns[5],
                           reinterpret_cast<uint16_t*>(columns[6]),
                           columns[7],
                           static_cast<int64_t>(header.numel),
                           header.rng_offset};
    const Norm all_norms[] = {kNorm1, kNorm2, kNormInf};
    for (const Norm norm : all_norms) {
      const double sum = ADAMOPS_TARGET::target.norm_range(tensor.grad, work.dtypes.grad, norm, tensor.numel);
      if (std::fwrite(&sum, sizeof sum, 1, stdout) != 1) return 4;
    }
    range(tensor, work, 0, tensor.numel);
    for (size_t i = 0; i < kColumns; ++i)
      if (std::fwrite(columns[i], 1, sizes[i].bytes, stdout) != sizes[i].bytes) return 4;
  }
  return 0;
}
