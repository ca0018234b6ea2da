// The Python module of a CPU op. It takes addresses, sizes and dtype codes, so it needs no torch to build or run. It
// picks the kernel for this CPU and splits the work over threads; the arithmetic is in the rule (rules/selected.h).
// Addresses from callers are trusted: adamops/optim/backends/cpu.py checks every tensor first.
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

#define ADAMOPS_TARGET_TYPE Target
ADAMOPS_TARGETS(ADAMOPS_DECLARE_TARGET)

namespace {

// A part begins at a multiple of the grain. So no two threads share a quantization block, which has one scale, nor a
// cache line of a column of 8 bits, the narrowest.
static_assert(Partition::kGrain % kQuantizationBlock == 0, "quantized states would depend on the threads");
static_assert(Partition::kGrain % 64 == 0, "two threads would write to one cache line");

SimdTargets<Target> simd_targets{ADAMOPS_TARGETS(ADAMOPS_TARGET_ADDRESS)};

std::vector<int64_t> sizes_of(const Table& table) {
  std::vector<int64_t> sizes;
  sizes.reserve(table.tensors.size());
  for (const Tensor& tensor : table.tensors) sizes.push_back(tensor.numel);
  return sizes;
}

// The kernel of each tensor of the table. `choose` returns null for dtypes that do not go together.
template <class Range, class Choose>
std::vector<Range> kernels(const Table& table, const Choose& choose) {
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
bool in_blocks(const Dtypes& dtypes, const Tensor& tensor, int prefetch_bytes) {
  constexpr int64_t kLarge = 1 << 16;
  return tensor.lowp_out || (prefetch_bytes && dtypes.param == kFloat32 && tensor.numel >= kLarge);
}

// One step for a table. The constructor does everything that can fail; run() cannot.
class PreparedStep {
 public:
  PreparedStep(Table& table, std::vector<StepScalars> scalars, StepOptions options, int threads)
      : table_(table), options_(options), threads_(threads), sizes_(sizes_of(table)), scalars_(std::move(scalars)) {
    const Target& target = simd_targets.in_use();
    static const int prefetch_bytes = prefetch_distance_bytes();
    prefetch_bytes_ = prefetch_bytes;
    ranges_ = kernels<StepRange>(table, [&](const Dtypes& dtypes, const Tensor& tensor) {
      return target.step_range(dtypes, options, in_blocks(dtypes, tensor, prefetch_bytes));
    });
    if (table.counts_on_device()) throw py::value_error("the CPU op takes step counts as numbers");
    if (!table.added.empty() && options.zero_grads) throw py::value_error("a step cannot zero grads that it adds up");
    add_range_ = target.add_range;
  }

  void run() {
    table_.count_writes(options_.zero_grads);
    table_.count_steps();  // before the update, while the states are still in the caches
    for_each_piece(sizes_, threads_, [&](size_t i, int64_t begin, int64_t end) {
      const Work work{table_.dtypes[i], options_, scalars_[table_.step_rows[i]], prefetch_bytes_};
      if (!table_.added.empty() && table_.added[i].grad)
        step_with_sum(i, work, begin, end);
      else
        ranges_[i](table_.tensors[i], work, begin, end);
    });
    table_.release();
  }

 private:
  // The same for a tensor whose grad is a sum, which is formed in the cache and nowhere else.
  void step_with_sum(size_t i, const Work& work, int64_t begin, int64_t end) const {
    constexpr int64_t kPiece = Partition::kGrain;  // longer ones are slower: the memory idles while one is summed
    alignas(64) float sum[kPiece];
    const Table::Added& added = table_.added[i];
    const auto* grads = static_cast<const char*>(added.grad);
    const auto* former = static_cast<const float*>(table_.tensors[i].grad);
    Tensor tensor = table_.tensors[i];
    for (int64_t from = begin; from < end; from += kPiece) {
      const int64_t to = std::min(from + kPiece, end);
      add_range_(former + from, grads + from * size_of(added.dtype), added.dtype, sum, to - from);
      // Its element `from` is sum[0].
      tensor.grad = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(sum) - from * sizeof(float));
      ranges_[i](tensor, work, from, to);
    }
  }

  Table& table_;
  StepOptions options_;
  int threads_, prefetch_bytes_;
  std::vector<int64_t> sizes_;
  std::vector<StepRange> ranges_;
  std::vector<StepScalars> scalars_;
  AddRange add_range_;
};

void step_with_scalars(Table& table, const std::vector<ScalarRow>& scalars, int mode, int threads, bool zero_grads,
                       bool stochastic_rounding) {
  const StepOptions options = options_of(table, mode, zero_grads, stochastic_rounding);
  PreparedStep(table, scalars_of(scalars, table.steps), options, threads).run();
}

// What Python passes for a step, in the order of the names in STEP_FIELDS.
using StepCall = std::tuple<Table*, HyperNumbers, double, double, bool, bool, bool, int>;
constexpr const char* kStepFields[] = {"table",    "hyper",      "loss_scale",          "grad_factor",
                                       "maximize", "zero_grads", "stochastic_rounding", "threads"};
static_assert(std::tuple_size_v<StepCall> == sizeof(kStepFields) / sizeof(kStepFields[0]));

// No Python code runs between the steps, so a signal handler cannot leave some of them undone.
void steps(const std::vector<StepCall>& calls) {
  std::vector<PreparedStep> prepared;
  prepared.reserve(calls.size());
  for (const auto& [table, numbers, loss_scale, grad_factor, maximize, zero_grads, stochastic_rounding, threads] :
       calls) {
    const Rule::Hyper hyper = hyper_of(numbers);
    prepared.emplace_back(*table, scalars_of(hyper, {loss_scale, grad_factor, maximize}, table->steps),
                          options_of(*table, Rule::mode(hyper), zero_grads, stochastic_rounding), threads);
  }
  for (PreparedStep& step : prepared) step.run();
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
    const auto own_dtype = static_cast<Dtype>(dtype[i]);
    for (int64_t begin = 0; begin < size; begin += kNormChunk)
      chunks.push_back(
          {address.pointer<const char>(i) + begin * size_of(own_dtype), std::min(kNormChunk, size - begin), own_dtype});
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

void add_grad(uintptr_t sum, uintptr_t grad, int64_t numel, int dtype, bool is_first, int threads) {
  if (dtype < 0 || dtype >= kDtypeCount) throw py::value_error("unknown dtype code " + std::to_string(dtype));
  const AddRange add_range = simd_targets.in_use().add_range;
  const auto own_dtype = static_cast<Dtype>(dtype);
  for_each_piece({numel}, threads, [&](size_t, int64_t begin, int64_t end) {
    float* const to = reinterpret_cast<float*>(sum) + begin;
    add_range(is_first ? nullptr : to, reinterpret_cast<const char*>(grad) + begin * size_of(own_dtype), own_dtype, to,
              end - begin);
  });
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

void bandwidth_probe(const Table& table, int prefetch_bytes, int threads) {
  const Target& target = simd_targets.in_use();
  const auto ranges =
      kernels<ProbeRange>(table, [&](const Dtypes& dtypes, const Tensor&) { return target.probe_range(dtypes); });
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

PYBIND11_MODULE(ADAMOPS_MODULE, module) {
  using namespace adamops;
  module.doc() = "A CPU op of adamops: the update of an optimizer on addresses. See csrc/python/cpu_module.cpp.";
  simd_targets.bind(module);
  bind_table(module, Rule::kStates, kLeastStates);
  bind_rule(module);
  py::list step_fields;
  for (const char* const name : kStepFields) step_fields.append(name);
  module.attr("STEP_FIELDS") = py::tuple(step_fields);
  module.def("steps", &steps, py::arg("calls"),
             "Steps, one after another, each a tuple with the fields that STEP_FIELDS names; `hyper` are the numbers "
             "that HYPER names. Counts them in the states that the tables were made from, tells autograd what was "
             "written of tables of a reader, and releases the references to the tensors.");
  module.def("step_with_scalars", &step_with_scalars, py::arg("table"), py::arg("scalars"), py::arg("mode"),
             py::arg("threads"), py::arg("zero_grads") = false, py::arg("stochastic_rounding") = false,
             "One step with a row of SCALAR_COUNT scalars for each of the table's steps. For tests.");
  module.def(
      "grad_norm",
      [](const py::list& addresses, const py::list& numels, const py::list& dtypes, double norm_type, int threads) {
        return grad_norm(addresses, numels, dtypes, norm_of_type(norm_type), threads);
      },
      py::arg("addresses"), py::arg("numels"), py::arg("dtypes"), py::arg("norm_type"), py::arg("threads"),
      "The norm of all elements of grads, in double, the same bits for any number of threads; NaN if one of them is.");
  module.def("add_grad", &add_grad, py::arg("sum"), py::arg("grad"), py::arg("numel"), py::arg("dtype"),
             py::arg("is_first"), py::arg("threads"),
             "Adds a grad to a sum in float32, element by element, or begins a sum with it.");
  module.def("samples_of", &samples_of, py::arg("reader"), py::arg("tensors"),
             "Some elements of each tensor, as bytes; None for a tensor that is not plain.");
  module.def("zero_fill", &zero_fill, py::arg("addresses"), py::arg("numels"), py::arg("element_size"),
             py::arg("threads"),
             "Zeroes tensors with the split of a step, so that each page lies near the thread that will use it.");
  module.def("bandwidth_probe", &bandwidth_probe, py::arg("table"), py::arg("prefetch_bytes"), py::arg("threads"),
             "Moves the bytes of a step and changes nothing. For the benchmark.");
}
