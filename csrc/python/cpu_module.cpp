// The Python module of the CPU op. It takes addresses, sizes and dtype codes, so it needs no torch to build or run. It
// picks the kernel for this CPU and splits the work over threads; the arithmetic is in rules/adam_update.h. Addresses
// from callers are trusted: adamops/optim/backends/cpu.py checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "formats/quantized_blocks.h"
#include "python/column.h"
#include "python/cpu_op.h"
#include "python/host_scalars.h"
#include "python/norm_type.h"
#include "python/table.h"

namespace py = pybind11;

namespace adamops {

#define ADAMOPS_TARGET_TYPE AdamTarget
ADAMOPS_TARGETS(ADAMOPS_DECLARE_TARGET)

namespace {

// A part begins at a multiple of the grain. So no two threads share a quantization block, which has one scale, nor a
// cache line of a column of 8 bits, the narrowest.
static_assert(Partition::kGrain % kQuantizationBlock == 0, "quantized states would depend on the threads");
static_assert(Partition::kGrain % 64 == 0, "two threads would write to one cache line");

SimdTargets<AdamTarget> simd_targets{ADAMOPS_TARGETS(ADAMOPS_TARGET_ADDRESS)};

std::vector<int64_t> sizes_of(const AdamTable& table) {
  std::vector<int64_t> sizes;
  sizes.reserve(table.tensors.size());
  for (const AdamTensor& tensor : table.tensors) sizes.push_back(tensor.numel);
  return sizes;
}

// The kernel of each tensor of the table. `choose` returns null for dtypes that do not go together.
template <class Range, class Choose>
std::vector<Range> kernels(const AdamTable& table, const Choose& choose) {
  std::vector<Range> ranges;
  ranges.reserve(table.tensors.size());
  for (size_t i = 0; i < table.tensors.size(); ++i) {
    ranges.push_back(choose(table.dtypes[i], table.tensors[i]));
    if (!ranges.back()) throw py::value_error("no kernel for these dtypes of param, grad, state and master");
  }
  return ranges;
}

// Whether a tensor goes to the staged kernel, which works in quantization blocks. It must if it has a lowp_out. On CPUs
// where software prefetch pays, large fp32 columns are also faster that way (docs/dev/decisions.md).
bool in_blocks(const AdamDtypes& dtypes, const AdamTensor& tensor, int prefetch_bytes) {
  constexpr int64_t kLarge = 1 << 16;
  return tensor.lowp_out || (prefetch_bytes && dtypes.param == kFloat32 && tensor.numel >= kLarge);
}

// One step for a table. The constructor does everything that can fail; run() cannot.
class PreparedStep {
 public:
  PreparedStep(AdamTable& table, const HostScalars& host_scalars, AdamMode mode, int threads)
      : table_(table), mode_(mode), threads_(threads), sizes_(sizes_of(table)) {
    const AdamTarget& target = simd_targets.in_use();
    static const int prefetch_bytes = prefetch_distance_bytes();
    prefetch_bytes_ = prefetch_bytes;
    ranges_ = kernels<AdamRange>(table, [&](const AdamDtypes& dtypes, const AdamTensor& tensor) {
      return target.adam_range(dtypes, mode, in_blocks(dtypes, tensor, prefetch_bytes));
    });
    if (table.counts_on_device()) throw py::value_error("the CPU op takes step counts as numbers");
    scalars_ = scalars_of(host_scalars, table.steps);
  }

  void run() {
    table_.count_writes(mode_.zero_grads);
    table_.count_steps();  // before the update, while the states are still in the caches
    for_each_piece(sizes_, threads_, [&](size_t i, int64_t begin, int64_t end) {
      ranges_[i](table_.tensors[i], {table_.dtypes[i], mode_, scalars_[table_.step_rows[i]], prefetch_bytes_}, begin,
                 end);
    });
    table_.release();
  }

 private:
  AdamTable& table_;
  AdamMode mode_;
  int threads_, prefetch_bytes_;
  std::vector<int64_t> sizes_;
  std::vector<AdamRange> ranges_;
  std::vector<AdamScalars> scalars_;
};

void adam_step(AdamTable& table, const HostScalars& host_scalars, bool l2, int threads, bool zero_grads,
               bool stochastic_rounding) {
  PreparedStep(table, host_scalars, {l2, table.amsgrad, zero_grads, stochastic_rounding}, threads).run();
}

// The arguments of adam_step(), with l2, zero_grads and stochastic_rounding before threads.
using StepArguments = std::tuple<AdamTable*, HyperNumbers, bool, bool, bool, int>;

// No Python code runs between the steps, so a signal handler cannot leave some of them undone.
void adam_steps(const std::vector<StepArguments>& calls) {
  std::vector<PreparedStep> steps;
  steps.reserve(calls.size());
  for (const auto& [table, numbers, l2, zero_grads, stochastic_rounding, threads] : calls)
    steps.emplace_back(*table, numbers, AdamMode{l2, table->amsgrad, zero_grads, stochastic_rounding}, threads);
  for (PreparedStep& step : steps) step.run();
}

double grad_norm(const py::list& addresses, const py::list& numels, const py::list& dtypes, Norm norm, int threads) {
  const size_t count = addresses.size();
  const Column address(addresses, count, "addresses"), numel(numels, count, "numels"), dtype(dtypes, count, "dtypes");
  struct Chunk {
    const char* begin;
    int64_t count;
    Dtype dtype;
  };
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < count; ++i) {
    if (dtype[i] >= kDtypeCount) throw py::value_error("unknown dtype code " + std::to_string(dtype[i]));
    const auto size = static_cast<int64_t>(numel[i]);
    const int64_t element_size = dtype[i] == kFloat32 ? 4 : 2;
    for (int64_t begin = 0; begin < size; begin += kNormChunk)
      chunks.push_back({address.pointer<const char>(i) + begin * element_size, std::min(kNormChunk, size - begin),
                        static_cast<Dtype>(dtype[i])});
  }

  std::vector<int64_t> sizes;
  sizes.reserve(chunks.size());
  for (const Chunk& chunk : chunks) sizes.push_back(chunk.count);
  std::vector<double> partial(chunks.size());
  const NormRange norm_range = simd_targets.in_use().norm_range;
  {
    const GilRelease release;
    const int most_parts = static_cast<int>(std::clamp<int64_t>(
        Partition(sizes, threads, kLeastElementsPerPart).parts(), 1, std::max<int64_t>(chunks.size(), 1)));
    parallel_for(most_parts, [&](int part) {
      const size_t parts = static_cast<size_t>(most_parts), own = static_cast<size_t>(part);
      for (size_t i = chunks.size() * own / parts; i < chunks.size() * (own + 1) / parts; ++i)
        partial[i] = norm_range(chunks[i].begin, chunks[i].dtype, norm, chunks[i].count);
    });
  }
  double result = 0.0;
  in_default_float_environment([&] {
    for (const double one : partial)
      result = norm == kNormInf ? (one > result || one != one ? one : result) : result + one;
    if (norm == kNorm2) result = std::sqrt(result);
  });
  return result;
}

// Four elements of each tensor, from the first to the last, as bytes; None for a tensor that is not plain.
py::list samples_of(const TensorReader& reader, const py::list& tensors) {
  constexpr int64_t kSamples = 4;
  py::list samples;
  for (const py::handle tensor : tensors) {
    TensorReader::View view;
    if (!reader.read(tensor.ptr(), view)) {
      samples.append(py::none());
      continue;
    }
    const int64_t size = view.tensor.dtype_bits / 8;
    std::string bytes;
    for (int64_t i = 0; i < kSamples && view.numel; ++i)
      bytes.append(static_cast<const char*>(view.address()) + (view.numel - 1) * i / (kSamples - 1) * size,
                   static_cast<size_t>(size));
    samples.append(py::bytes(bytes));
  }
  return samples;
}

void bandwidth_probe(const AdamTable& table, int prefetch_bytes, int threads) {
  const AdamTarget& target = simd_targets.in_use();
  const auto ranges = kernels<ProbeRange>(
      table, [&](const AdamDtypes& dtypes, const AdamTensor&) { return target.probe_range(dtypes); });
  for_each_piece(sizes_of(table), threads, [&](size_t i, int64_t begin, int64_t end) {
    ranges[i](table.tensors[i], begin, end, prefetch_bytes);
  });
}

void zero_fill(const py::list& addresses, const py::list& numels, int element_size, int threads) {
  const size_t count = addresses.size();
  const Column address(addresses, count, "addresses"), numel(numels, count, "numels");
  std::vector<char*> starts(count);
  std::vector<int64_t> sizes(count);
  for (size_t i = 0; i < count; ++i) {
    starts[i] = address.pointer<char>(i);
    sizes[i] = static_cast<int64_t>(numel[i]);
  }
  for_each_piece(sizes, threads, [&](size_t i, int64_t begin, int64_t end) {
    std::memset(starts[i] + begin * element_size, 0, static_cast<size_t>((end - begin) * element_size));
  });
}

}  // namespace
}  // namespace adamops

PYBIND11_MODULE(cpu_adam, module) {
  using namespace adamops;
  module.doc() = "The CPU op of adamops: Adam on addresses. See csrc/python/cpu_module.cpp.";
  simd_targets.bind(module);
  bind_adam_table(module);
  module.def("adam_step", &adam_step, py::arg("table"), py::arg("scalars"), py::arg("l2"), py::arg("threads"),
             py::arg("zero_grads") = false, py::arg("stochastic_rounding") = false,
             "One step for the table's tensors, with the scalars of AdamHyper.numbers(), or with a row of scalars for "
             "each of the table's steps. Counts it in the states that the table was made from, and releases the "
             "references to the tensors.");
  module.def("adam_steps", &adam_steps, py::arg("calls"),
             "Steps of (table, AdamHyper.numbers(), l2, zero_grads, stochastic_rounding, threads) each, one after "
             "another. Of tables of a reader autograd is told what was written.");
  module.def(
      "grad_norm",
      [](const py::list& addresses, const py::list& numels, const py::list& dtypes, double norm_type, int threads) {
        return grad_norm(addresses, numels, dtypes, norm_of_type(norm_type), threads);
      },
      py::arg("addresses"), py::arg("numels"), py::arg("dtypes"), py::arg("norm_type"), py::arg("threads"),
      "The norm of all elements of grads, in double, the same bits for any number of threads; NaN if one of them is.");
  module.def("samples_of", &samples_of, py::arg("reader"), py::arg("tensors"),
             "Some elements of each tensor, as bytes; None for a tensor that is not plain.");
  module.def("zero_fill", &zero_fill, py::arg("addresses"), py::arg("numels"), py::arg("element_size"),
             py::arg("threads"),
             "Zeroes tensors with the split of adam_step, so that each page lies near the thread that will use it.");
  module.def("bandwidth_probe", &bandwidth_probe, py::arg("table"), py::arg("prefetch_bytes"), py::arg("threads"),
             "Moves the bytes of adam_step and changes nothing. For the benchmark.");
}
