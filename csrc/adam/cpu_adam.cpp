// The Python module of the CPU op. It takes addresses, sizes and dtype codes, so it needs no torch to build or to run;
// picks the kernel for this CPU; and splits the work over threads. The arithmetic is in adam_update.h. Callers are
// trusted with addresses: adamops/ops/adam/native_backend.py checks every tensor first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "../dlpack.h"
#include "../parallel.h"
#include "../simd/cpu_features.h"
#include "cpu_adam_kernel.h"

namespace py = pybind11;

namespace adamops {

// ADAMOPS_TARGETS(X) comes from the build (op_builder/cpu.py): X(avx512) X(avx2) X(baseline), say, best first.
#define ADAMOPS_DECLARE(name)     \
  namespace name {                \
  extern const AdamTarget target; \
  }
ADAMOPS_TARGETS(ADAMOPS_DECLARE)
#undef ADAMOPS_DECLARE

namespace {

#define ADAMOPS_ADDRESS(name) &name::target,
constexpr const AdamTarget* kTargets[] = {ADAMOPS_TARGETS(ADAMOPS_ADDRESS)};
#undef ADAMOPS_ADDRESS

// Below this, waking a thread costs more than it saves (measured: docs/dev/decisions.md).
constexpr int64_t kLeastElementsPerPart = 8192;

bool runs_here(const AdamTarget& target) {
  return (target.required_features & ~cpu_features()) == 0;
}

const AdamTarget* best_target() {
  for (const AdamTarget* target : kTargets)
    if (runs_here(*target)) return target;
  return nullptr;
}

std::atomic<const AdamTarget*> current_target{nullptr};

void use_target(const std::string& name) {
  std::string names;
  for (const AdamTarget* target : kTargets) {
    if (name == target->name) {
      if (!runs_here(*target)) throw py::value_error("this CPU cannot run the SIMD target '" + name + "'");
      current_target = target;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + target->name;
  }
  throw py::value_error("no SIMD target '" + name + "' in this build; it has: " + names);
}

// One column of the table of tensors: a Python list of ints, read without the cost of a generic conversion.
class Column {
 public:
  Column(const py::list& values, size_t expected, const char* name) : values_(values) {
    if (values.size() != expected)
      throw py::value_error(std::string(name) + " has " + std::to_string(values.size()) + " entries, expected " +
                            std::to_string(expected));
  }
  size_t operator[](size_t index) const {
    const size_t value = PyLong_AsSize_t(PyList_GET_ITEM(values_.ptr(), static_cast<Py_ssize_t>(index)));
    if (value == static_cast<size_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  T* pointer(size_t index) const {
    return reinterpret_cast<T*>((*this)[index]);
  }

 private:
  const py::list& values_;
};

// The three dtypes of a tensor as one number: param + 3 * grad + 9 * state.
struct Dtypes {
  Dtype param, grad, state;

  Dtypes(Dtype param, Dtype grad, Dtype state) : param(param), grad(grad), state(state) {}
  explicit Dtypes(size_t code)
      : param(static_cast<Dtype>(code % kDtypeCount)),
        grad(static_cast<Dtype>(code / kDtypeCount % kDtypeCount)),
        state(static_cast<Dtype>(code / kDtypeCount / kDtypeCount)) {
    if (state >= kDtypeCount) throw py::value_error("unknown dtype code " + std::to_string(code));
  }
};

// A list of tensors with what belongs to each, ready for the kernels. It holds addresses and owns nothing.
struct AdamTable {
  bool amsgrad;  // of its own, since an empty tensor has a null address in every column
  std::vector<AdamTensor> tensors;
  std::vector<Dtypes> dtypes;

  std::vector<int64_t> sizes() const {
    std::vector<int64_t> result;
    result.reserve(tensors.size());
    for (const AdamTensor& tensor : tensors) result.push_back(tensor.numel);
    return result;
  }
};

AdamTable table_of_addresses(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                             const py::list& exp_avg_sqs, const py::object& max_exp_avg_sqs, const py::list& numels,
                             const py::list& dtypes) {
  const size_t count = params.size();
  const bool amsgrad = !max_exp_avg_sqs.is_none();
  const py::list max_list = amsgrad ? py::list(max_exp_avg_sqs) : params;
  const Column param(params, count, "params"), grad(grads, count, "grads"), exp_avg(exp_avgs, count, "exp_avgs"),
      exp_avg_sq(exp_avg_sqs, count, "exp_avg_sqs"), max_exp_avg_sq(max_list, count, "max_exp_avg_sqs"),
      numel(numels, count, "numels"), dtype(dtypes, count, "dtypes");
  AdamTable table{amsgrad, {}, {}};
  table.tensors.reserve(count);
  table.dtypes.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    table.tensors.push_back({param.pointer<void>(i), grad.pointer<const void>(i), exp_avg.pointer<void>(i),
                             exp_avg_sq.pointer<void>(i), amsgrad ? max_exp_avg_sq.pointer<void>(i) : nullptr,
                             static_cast<int64_t>(numel[i])});
    table.dtypes.emplace_back(dtype[i]);
  }
  return table;
}

// Reads tensors through torch's DLPack exchange table, and only the plain ones: exactly of one of the given types (not
// a subclass, whose data may live elsewhere), in host memory, contiguous, of a dtype that the kernels know.
class TensorReader {
 public:
  // `capsule` is Tensor.__dlpack_c_exchange_api__; `types` are the Python types to read.
  TensorReader(const py::object& capsule, const py::tuple& types) : capsule_(capsule), types_(types) {
    api_ = static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kDlExchangeCapsule));
    if (!api_) throw py::error_already_set();
    if (api_->major_version != 1 || !api_->tensor_from_py_object)
      throw py::value_error("this DLPack exchange table is of another version");
  }

  struct View {
    DlTensor tensor;
    Dtype dtype;
    int64_t numel;
  };

  bool read(PyObject* object, View& view) const {
    if (!is_plain(object)) return false;
    if (api_->tensor_from_py_object(object, &view.tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    const DlTensor& tensor = view.tensor;
    if (tensor.device_type != kDlCpu || tensor.dtype_lanes != 1) return false;
    if (tensor.dtype_code == kDlFloat && tensor.dtype_bits == 32) {
      view.dtype = kFloat32;
    } else if (tensor.dtype_code == kDlFloat && tensor.dtype_bits == 16) {
      view.dtype = kFloat16;
    } else if (tensor.dtype_code == kDlBfloat && tensor.dtype_bits == 16) {
      view.dtype = kBfloat16;
    } else {
      return false;
    }
    view.numel = 1;
    bool contiguous = true;
    for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
      if (tensor.strides && tensor.shape[i] != 1 && tensor.strides[i] != view.numel) contiguous = false;
      view.numel *= tensor.shape[i];
    }
    return contiguous || view.numel == 0;
  }

  // Asks for the memory that read() will look at, some rows before: after a step nothing of it is left in the caches.
  // In a torch tensor the word behind the object's header points to what the tensor is; were it anything else, a
  // prefetch would be wasted and no more.
  static constexpr size_t kRowsAhead = 6;
  void prefetch(PyObject* object) const {
    if (!is_plain(object)) return;
    const char* tensor;
    std::memcpy(&tensor, object + 1, sizeof tensor);
    for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + line * 64);
  }

  static void* address(const View& view) { return static_cast<char*>(view.tensor.data) + view.tensor.byte_offset; }

  static bool same_shape(const View& a, const View& b) {
    return a.tensor.ndim == b.tensor.ndim && std::equal(a.tensor.shape, a.tensor.shape + a.tensor.ndim, b.tensor.shape);
  }

 private:
  bool is_plain(PyObject* object) const {
    for (const py::handle type : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr()) return true;
    return false;
  }

  py::object capsule_;
  py::tuple types_;
  const DlExchangeApi* api_;
};

// The table of these lists of tensors if every tensor is plain and fits its param; None otherwise, and then it is for
// the caller to find out what is the matter.
std::optional<AdamTable> table_of_tensors(const TensorReader& reader, const py::list& params, const py::list& grads,
                                          const py::list& exp_avgs, const py::list& exp_avg_sqs,
                                          const py::object& max_exp_avg_sqs) {
  const size_t count = params.size();
  const bool amsgrad = !max_exp_avg_sqs.is_none();
  const py::list max_list = amsgrad ? py::list(max_exp_avg_sqs) : params;
  if (grads.size() != count || exp_avgs.size() != count || exp_avg_sqs.size() != count || max_list.size() != count)
    throw py::value_error("the lists of tensors differ in length");
  AdamTable table{amsgrad, {}, {}};
  table.tensors.reserve(count);
  table.dtypes.reserve(count);
  const auto prefetch_row = [&](size_t row) {
    for (const py::list* list : {&params, &grads, &exp_avgs, &exp_avg_sqs})
      reader.prefetch(PyList_GET_ITEM(list->ptr(), static_cast<Py_ssize_t>(std::min(row, count - 1))));
  };
  for (size_t i = 0; i < count; ++i) {
    prefetch_row(i + TensorReader::kRowsAhead);
    TensorReader::View param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
    const auto read = [&](const py::list& list, TensorReader::View& view) {
      return reader.read(PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)), view) &&
             TensorReader::same_shape(view, param);
    };
    if (!reader.read(PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i)), param) || !read(grads, grad) ||
        !read(exp_avgs, exp_avg) || !read(exp_avg_sqs, exp_avg_sq) || exp_avg.dtype != exp_avg_sq.dtype)
      return std::nullopt;
    if (amsgrad && (!read(max_list, max_exp_avg_sq) || max_exp_avg_sq.dtype != exp_avg.dtype)) return std::nullopt;
    const bool grad_fits = grad.dtype == param.dtype || grad.dtype == kFloat32;
    const bool states_fit = exp_avg.dtype == param.dtype || exp_avg.dtype == kFloat32;
    if (!grad_fits || !states_fit) return std::nullopt;
    table.tensors.push_back({TensorReader::address(param), TensorReader::address(grad), TensorReader::address(exp_avg),
                             TensorReader::address(exp_avg_sq),
                             amsgrad ? TensorReader::address(max_exp_avg_sq) : nullptr, param.numel});
    table.dtypes.push_back({param.dtype, grad.dtype, exp_avg.dtype});
  }
  return table;
}

// Runs visit(tensor index, begin, end) over all elements of all tensors, on at most `threads` threads, without the GIL.
template <class Visit>
void for_each_piece(const std::vector<int64_t>& sizes, int threads, const Visit& visit) {
  const py::gil_scoped_release release;
  const Partition partition(sizes, threads, kLeastElementsPerPart);
  parallel_for(partition.parts(), [&](int part) { partition.for_each(part, visit); });
}

using ScalarRow = std::array<float, sizeof(AdamScalars) / sizeof(float)>;

// The kernel of each tensor of the table; `choose` gives null for dtypes that do not go together.
template <class Range, class Choose>
std::vector<Range> kernels(const AdamTable& table, const Choose& choose) {
  std::vector<Range> ranges;
  ranges.reserve(table.tensors.size());
  for (const Dtypes& dtypes : table.dtypes) {
    ranges.push_back(choose(dtypes));
    if (!ranges.back()) throw py::value_error("no kernel for these dtypes of param, grad and state");
  }
  return ranges;
}

void adam_step(const AdamTable& table, const py::list& scalar_rows, const std::vector<ScalarRow>& scalars, bool l2,
               int threads) {
  const AdamTarget& target = *current_target.load();
  const size_t count = table.tensors.size();
  const auto ranges = kernels<AdamRange>(
      table, [&](const Dtypes& d) { return target.adam_range(d.param, d.grad, d.state, l2, table.amsgrad); });
  const Column row(scalar_rows, count, "scalar_rows");
  std::vector<AdamScalars> tensor_scalars(count);
  for (size_t i = 0; i < count; ++i) std::memcpy(&tensor_scalars[i], scalars.at(row[i]).data(), sizeof(AdamScalars));

  static const int prefetch_bytes = prefetch_distance_bytes();
  for_each_piece(table.sizes(), threads, [&](size_t i, int64_t begin, int64_t end) {
    ranges[i](table.tensors[i], begin, end, tensor_scalars[i], prefetch_bytes);
  });
}

void touch(const AdamTable& table, int prefetch_bytes, int threads) {
  const AdamTarget& target = *current_target.load();
  const auto ranges =
      kernels<TouchRange>(table, [&](const Dtypes& d) { return target.touch_range(d.param, d.grad, d.state); });
  for_each_piece(table.sizes(), threads, [&](size_t i, int64_t begin, int64_t end) {
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
  module.doc() = "The CPU op of adamops: Adam on addresses. See csrc/adam/cpu_adam.cpp.";
  current_target = best_target();
  if (!current_target.load()) throw py::import_error("cpu_adam was built without a SIMD target that this CPU can run");

  py::class_<AdamTable>(module, "AdamTable", "Params with their grads and states, as addresses; owns none of them.")
      .def("__len__", [](const AdamTable& table) { return table.tensors.size(); });
  py::class_<TensorReader>(module, "TensorReader", "Reads plain tensors through torch's DLPack exchange table.")
      .def(py::init<const py::object&, const py::tuple&>(), py::arg("capsule"), py::arg("types"));

  module.def(
      "table_of_addresses", &table_of_addresses, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
      py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("numels"), py::arg("dtypes"),
      "A table of columns of addresses, sizes and dtype codes (param + 3 * grad + 9 * state), which are trusted.");
  module.def("table_of_tensors", &table_of_tensors, py::arg("reader"), py::arg("params"), py::arg("grads"),
             py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"),
             "A table of lists of tensors, or None if one of them is not plain or does not fit its param.");
  module.def("adam_step", &adam_step, py::arg("table"), py::arg("scalar_rows"), py::arg("scalars"), py::arg("l2"),
             py::arg("threads"),
             "One step for the table's tensors, each with the row of scalars that scalar_rows names.");
  module.def("zero_fill", &zero_fill, py::arg("addresses"), py::arg("numels"), py::arg("element_size"),
             py::arg("threads"),
             "Zeroes tensors with the split of adam_step, so that each page lies near the thread that will use it.");
  module.def("touch", &touch, py::arg("table"), py::arg("prefetch_bytes"), py::arg("threads"),
             "Moves the bytes of adam_step and computes nothing; destroys the values. For the benchmark.");

  module.def(
      "targets",
      [] {
        std::vector<std::string> names;
        for (const AdamTarget* target : kTargets) names.emplace_back(target->name);
        return names;
      },
      "The SIMD targets in this build, best first.");
  module.def(
      "supported_targets",
      [] {
        std::vector<std::string> names;
        for (const AdamTarget* target : kTargets)
          if (runs_here(*target)) names.emplace_back(target->name);
        return names;
      },
      "Those of targets() that this CPU can run, best first.");
  module.def("target", [] { return current_target.load()->name; }, "The SIMD target in use.");
  module.def("use_target", &use_target, py::arg("name"), "Chooses a SIMD target; ValueError if it cannot run here.");
  module.def("openmp_runtime", &openmp_runtime, "The file of the OpenMP runtime in use; empty if there is none.");
}
