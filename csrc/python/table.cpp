// Builds the table of a step: see python/table.h.
#include "python/table.h"

#include <algorithm>
#include <array>
#include <string>

#include "formats/quantized_blocks.h"

namespace py = pybind11;

namespace adamops {

namespace {

// The states of the module's rule.
struct RuleStates {
  StateSpec specs[kMostStates];
  PyObject* names[kMostStates] = {};  // interned
  int least = 0, most = 0;            // how many may be in use

  // Raises ValueError for a number of states that the rule does not have.
  int checked_count(int count) const {
    if (count < least || count > most)
      throw py::value_error("state_count is " + std::to_string(count) + ", expected " + std::to_string(least) + " to " +
                            std::to_string(most));
    return count;
  }
};
RuleStates rule_states;

// The other names in a param's state, interned once.
struct Names {
  PyObject *grad, *step, *scales, *master, *remainder;

  Names()
      : grad(PyUnicode_InternFromString("grad")),
        step(PyUnicode_InternFromString("step")),
        scales(PyUnicode_InternFromString("block_scales")),
        master(PyUnicode_InternFromString("master_param")),
        remainder(PyUnicode_InternFromString("param_remainder")) {}
};

const Names& names() {
  static const Names names;
  return names;
}

// A borrowed entry of a dict, null if there is none.
PyObject* entry(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A new reference to an entry of a dict, empty if there is none.
py::object owned_entry(PyObject* dict, PyObject* key) {
  return py::reinterpret_borrow<py::object>(entry(dict, key));
}

// How many quantization blocks the states of a tensor have (formats/quantized_blocks.h).
int64_t blocks_of(int64_t numel) {
  return (numel + kQuantizationBlock - 1) / kQuantizationBlock;
}

Master master_of_number(int number) {
  if (number < kNoMaster || number > kRemainder16)
    throw py::value_error("unknown kind of master " + std::to_string(number));
  return static_cast<Master>(number);
}

// A row of a table as Python gives it: fields by name, each of which must be read.
class Row {
 public:
  explicit Row(py::handle fields) : fields_(fields.ptr()) {
    if (!PyDict_Check(fields_)) throw py::type_error("a row of a table is not a dict");
  }

  size_t number(const char* name) { return to_number(name, find_required(name)); }
  size_t number(const char* name, size_t otherwise) {
    PyObject* const value = find(name);
    return value ? to_number(name, value) : otherwise;
  }
  template <class T>
  T* required(const char* name) {
    return reinterpret_cast<T*>(number(name));
  }
  template <class T>
  T* optional(const char* name) {
    return reinterpret_cast<T*>(number(name, 0));
  }

  // Writes the addresses of as many states to `to`.
  void states(int count, void** to) {
    const auto given = py::reinterpret_borrow<py::sequence>(find_required("states"));
    if (!PySequence_Check(given.ptr()) || given.size() != static_cast<size_t>(count))
      throw py::value_error("a row's states are not " + std::to_string(count) + " addresses");
    for (const py::handle address : given) *to++ = reinterpret_cast<void*>(to_number("states", address.ptr()));
  }

  Dtype dtype(const char* name) { return to_dtype(name, kDtypeCount, number(name)); }
  Dtype state_dtype() { return to_dtype("state_dtype", kQuantized + 1, number("state_dtype")); }

  // The dtype of the 16-bit copy, which a row without one may leave out.
  Dtype lowp_dtype(bool is_needed) {
    return to_dtype("lowp_dtype", kDtypeCount, is_needed ? number("lowp_dtype") : number("lowp_dtype", kFloat32));
  }

  // A new reference to a dict; empty if there is none.
  py::object dict(const char* name) {
    PyObject* const value = find(name);
    if (value && !PyDict_Check(value)) throw py::type_error(std::string(name) + " of a row is not a dict");
    return py::reinterpret_borrow<py::object>(value);
  }

  void check_all_read() const {
    if (PyDict_Size(fields_) != read_) throw py::value_error("a row of a table has a field of an unknown name");
  }

 private:
  PyObject* find(const char* name) {
    PyObject* const value = PyDict_GetItemString(fields_, name);
    read_ += value != nullptr;
    return value == Py_None ? nullptr : value;
  }
  PyObject* find_required(const char* name) {
    PyObject* const value = find(name);
    if (!value) throw py::value_error(std::string("a row of a table has no ") + name);
    return value;
  }
  static Dtype to_dtype(const char* name, int count, size_t found) {
    if (found >= static_cast<size_t>(count))
      throw py::value_error(std::string(name) + " is " + std::to_string(found) + ", which is no dtype");
    return static_cast<Dtype>(found);
  }
  static size_t to_number(const char* name, PyObject* value) {
    const size_t number = PyLong_Check(value) ? PyLong_AsSize_t(value) : static_cast<size_t>(-1);
    if (number == static_cast<size_t>(-1)) {
      PyErr_Clear();
      throw py::type_error(std::string(name) + " of a row is not an int of 0 or more");
    }
    return number;
  }

  PyObject* fields_;
  Py_ssize_t read_ = 0;
};

// Finds the states of params one after another. The dict of states usually has them in the order of the params.
// Comparing a pointer then replaces torch's hash of a tensor, which is a Python function.
class StateFinder {
 public:
  // `position` is where to look first, as PyDict_Next counts; any number is safe.
  StateFinder(PyObject* states, Py_ssize_t position) : states_(states), next_(position) {}

  // How many entries to try for params after the first: enough to skip some that have no grad.
  static constexpr Py_ssize_t kReach = 4;

  // The state of a param, borrowed; null if there is none. Tries `reach` entries before it looks the param up by hash.
  PyObject* find(PyObject* param, Py_ssize_t reach) {
    Py_ssize_t position = next_;
    PyObject *key, *state;
    for (; reach > 0; --reach) {
      found_ = position;
      if (!PyDict_Next(states_, &position, &key, &state)) {
        position = 0;  // go on with the first entry: the search began in the middle
        continue;
      }
      if (key == param) {
        next_ = position;
        return state;
      }
    }
    return entry(states_, param);
  }

  // The position of the last state, if it was found without hashing.
  Py_ssize_t found() const { return found_; }

 private:
  PyObject* states_;
  Py_ssize_t next_, found_ = 0;
};

}  // namespace

void Table::reserve(size_t count) {
  tensors.reserve(count);
  dtypes.reserve(count);
  step_rows.reserve(count);
  objects_.reserve(count);
  written_.reserve(3 * count);
  grads_.reserve(count);
}

void Table::add_step(int64_t step) {
  if (step_rows.empty() || steps[step_rows.back()] != step) {
    const auto [found, is_new] = row_of_step_.try_emplace(step, static_cast<uint32_t>(steps.size()));
    step_rows.push_back(found->second);
    if (is_new) steps.push_back(step);
  } else {
    step_rows.push_back(step_rows.back());
  }
}

void Table::count_steps() const {
  if (counts_on_device()) return;
  std::vector<py::int_> counts(steps.begin(), steps.end());
  for (size_t row = 0; row < objects_.size(); ++row) {
    if (PyDict_SetItem(objects_[row].state.ptr(), names().step, counts[step_rows[row]].ptr()) != 0)
      throw py::error_already_set();
  }
}

void Table::count_writes(bool zero_grads) {
  for (VersionCounter* const counter : written_) count_write(*counter);
  if (zero_grads)
    for (VersionCounter* const counter : grads_) count_write(*counter);
  written_.clear();
  grads_.clear();
}

std::vector<std::pair<uintptr_t, int64_t>> Table::spans() const {
  std::vector<std::pair<uintptr_t, int64_t>> spans;
  // A null address counts too: the tensor's storage was freed before its address was read.
  const auto add_span = [&spans](const void* address, int64_t size) {
    if (size) spans.emplace_back(reinterpret_cast<uintptr_t>(address), size);
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const Dtypes& own = dtypes[i];
    add_span(tensor.param, tensor.numel * size_of(own.param));
    add_span(tensor.grad, tensor.numel * size_of(own.grad));
    for (int s = 0; s < state_count; ++s) add_span(tensor.states[s], tensor.numel * size_of(own.state));
    if (own.master != kNoMaster)
      add_span(tensor.master, tensor.numel * (own.master == kMasterFp32 ? 4 : own.master == kRemainder16 ? 2 : 1));
    if (own.state == kQuantized) add_span(tensor.scales, blocks_of(tensor.numel) * state_count * 2);
    if (tensor.lowp_out) add_span(tensor.lowp_out, tensor.numel * size_of(own.lowp_out));
  }
  for (const float* const count : device_steps) spans.emplace_back(reinterpret_cast<uintptr_t>(count), sizeof *count);
  return spans;
}

py::list Table::borrowed() const {
  py::list tensors;
  const auto append = [&tensors](const py::object& tensor) {
    if (tensor) tensors.append(tensor);
  };
  for (const Objects& row : objects_) {
    append(row.param);
    append(row.grad);
    for (const py::object& state : row.states) append(state);
    append(row.scales);
    append(row.master);
  }
  if (counts_on_device())
    for (const Objects& row : objects_) tensors.append(row.step);
  return tensors;
}

void Table::add_state(py::object state) {
  objects_.emplace_back();
  objects_.back().state = std::move(state);
}

bool Table::add(const TensorReader& reader, PyObject* param, py::object grad, PyObject* state, uint32_t rng_offset) {
  if (!state || !PyDict_Check(state)) return false;
  const bool sharded = reader.is_sharded(param);
  // The state's tensor of this name, or its local tensor if the param is sharded. Empty if there is none, or if only
  // one of the two is sharded.
  const auto state_tensor = [&](PyObject* name) {
    py::object tensor = owned_entry(state, name);
    if (!tensor || reader.is_sharded(tensor.ptr()) != sharded) return py::object();
    return sharded ? reader.local(tensor.ptr()) : tensor;
  };
  TensorReader::View p, g, states[kMostStates] = {}, scales{}, master_view{};
  Objects row;
  row.param = py::reinterpret_borrow<py::object>(param);
  if (reader.is_sharded(grad.ptr()) != sharded) return false;
  if (sharded) {
    if (!reader.sharded_alike(param, grad.ptr())) return false;
    row.param = reader.local(param);
    grad = reader.local(grad.ptr());
  }
  row.grad = std::move(grad);
  row.state = py::reinterpret_borrow<py::object>(state);
  row.step = owned_entry(state, names().step);
  for (int i = 0; i < state_count; ++i) row.states[i] = state_tensor(rule_states.names[i]);

  const auto read = [&](const py::object& object, TensorReader::View& view) {
    return object && reader.read(object.ptr(), view) && view.same_shape(p);
  };
  const auto read_integers = [&](const py::object& object, bool is_signed, int bits, TensorReader::View& view) {
    return object && reader.read_integers(object.ptr(), is_signed, bits, view) && view.same_shape(p);
  };
  const auto read_states = [&](const auto& read_state) {
    for (int i = 0; i < state_count; ++i)
      if (!read_state(i)) return false;
    return true;
  };

  if (!reader.read(row.param.ptr(), p) || !read(row.grad, g)) return false;
  Dtype state_dtype = kFloat32;  // without states, any that kernels take
  if (read_states([&](int i) { return read(row.states[i], states[i]); })) {
    if (state_count) state_dtype = states[0].dtype;
    for (int i = 0; i < state_count; ++i)
      if (states[i].dtype != state_dtype) return false;
    // Scales next to floating-point states mean that someone took quantized states for plain numbers and cast them to
    // floats. Only looked for if the state has more entries than the step needs.
    const Py_ssize_t needed = 1 + state_count + (p.dtype != kFloat32 && master != kNoMaster ? 1 : 0);
    if (PyDict_Size(state) > needed && entry(state, names().scales)) return false;
  } else {
    const auto read_quantized = [&](int i) {
      return read_integers(row.states[i], rule_states.specs[i].sign == kSigned, 8, states[i]);
    };
    row.scales = owned_entry(state, names().scales);  // always plain: they belong to what this rank holds
    if (!read_states(read_quantized) || !row.scales || !reader.read(row.scales.ptr(), scales)) return false;
    if (scales.dtype != kBfloat16 || scales.tensor.ndim != 2) return false;
    if (scales.tensor.shape[0] != blocks_of(p.numel) || scales.tensor.shape[1] != state_count) return false;
    state_dtype = kQuantized;
  }

  const Master own_master = p.dtype == kFloat32 ? kNoMaster : master;
  // Of a param that was of 16 bits before. This step makes them stale, so the slow path drops them.
  if (p.dtype == kFloat32 && master != kNoMaster && (entry(state, names().master) || entry(state, names().remainder)))
    return false;
  if (own_master == kMasterFp32) {
    row.master = state_tensor(names().master);
    if (!read(row.master, master_view) || master_view.dtype != kFloat32 || state_dtype != kFloat32) return false;
  } else if (own_master != kNoMaster) {
    row.master = state_tensor(names().remainder);
    if (!read_integers(row.master, true, own_master == kRemainder8 ? 8 : 16, master_view)) return false;
  }

  const Dtypes own_dtypes = {p.dtype, g.dtype, state_dtype, own_master, kFloat32};
  if (!is_supported(own_dtypes) || !add_step(reader, row.step)) return false;
  Tensor tensor = {};
  tensor.param = p.address();
  tensor.grad = g.address();
  for (int i = 0; i < state_count; ++i) tensor.states[i] = states[i].address();
  if (own_master != kNoMaster) tensor.master = master_view.address();
  if (state_dtype == kQuantized) tensor.scales = static_cast<uint16_t*>(scales.address());
  tensor.numel = p.numel;
  tensor.rng_offset = rng_offset;
  tensors.push_back(tensor);
  dtypes.push_back(own_dtypes);
  objects_.push_back(std::move(row));
  written_.push_back(p.version);
  for (int i = 0; i < state_count; ++i) written_.push_back(states[i].version);
  if (state_dtype == kQuantized) written_.push_back(scales.version);
  if (own_master != kNoMaster) written_.push_back(master_view.version);
  grads_.push_back(g.version);
  this->sharded |= sharded;
  return true;
}

bool Table::add_step(const TensorReader& reader, const py::object& step) {
  if (step && PyLong_CheckExact(step.ptr())) {
    if (counts_on_device()) return false;
    int overflow = 0;
    const long long done = PyLong_AsLongLongAndOverflow(step.ptr(), &overflow);
    if (overflow || done < 0 || done >= kMostSteps) return false;
    add_step(done + 1);
    return true;
  }
  TensorReader::View count;
  if (!step || !step_rows.empty() || !reader.read(step.ptr(), count)) return false;
  if (count.dtype != kFloat32 || count.numel != 1) return false;
  device_steps.push_back(static_cast<float*>(count.address()));
  written_.push_back(count.version);
  return true;
}

bool grads_overlap(const std::vector<const Table*>& tables) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Table* const table : tables) {
    spans.reserve(spans.size() + table->tensors.size());
    for (size_t i = 0; i < table->tensors.size(); ++i) {
      const Tensor& tensor = table->tensors[i];
      const auto* const begin = static_cast<const char*>(tensor.grad);
      if (tensor.numel) spans.emplace_back(begin, begin + tensor.numel * size_of(table->dtypes[i].grad));
    }
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return true;
  return false;
}

std::unique_ptr<Table> table_of_params(const TensorReader& reader, const py::list& params, const py::dict& states,
                                       int state_count, int master, Py_ssize_t first_state, uint32_t rng_offset) {
  auto table = std::make_unique<Table>(rule_states.checked_count(state_count), master_of_number(master));
  table->reserve(params.size());
  StateFinder finder(states.ptr(), first_state);
  // Reads the list's size in each iteration, since reading a grad may run foreign code.
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, names().grad));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;  // frozen params may be of any kind
    if (!reader.is_plain(param) && !reader.is_sharded(param)) return nullptr;
    const bool first = table->tensors.empty();
    PyObject* const state = finder.find(param, first ? PyDict_Size(states.ptr()) + 1 : StateFinder::kReach);
    if (!table->add(reader, param, std::move(grad), state, rng_offset + static_cast<uint32_t>(i))) return nullptr;
    if (first) table->first_state = finder.found();
  }
  return table;
}

std::unique_ptr<Table> table_of_rows(const py::list& rows, int state_count, int master, bool counts_on_device) {
  auto table = std::make_unique<Table>(rule_states.checked_count(state_count), master_of_number(master));
  table->reserve(rows.size());
  size_t counted = 0;
  for (const py::handle fields : rows) {
    Row row(fields);
    Tensor tensor = {};
    tensor.param = row.required<void>("param");
    tensor.grad = row.required<void>("grad");
    row.states(state_count, tensor.states);
    tensor.master = row.optional<void>("master");
    tensor.scales = row.optional<uint16_t>("scales");
    tensor.lowp_out = row.optional<void>("lowp_out");
    tensor.numel = static_cast<int64_t>(row.number("numel"));
    tensor.rng_offset = static_cast<uint32_t>(row.number("rng_offset", 0));
    const Master own_master = tensor.master ? table->master : kNoMaster;
    table->dtypes.push_back({row.dtype("param_dtype"), row.dtype("grad_dtype"), row.state_dtype(), own_master,
                             row.lowp_dtype(tensor.lowp_out)});
    table->tensors.push_back(tensor);
    if (counts_on_device)
      table->device_steps.push_back(row.required<float>("step"));
    else
      table->add_step(static_cast<int64_t>(row.number("step")));
    if (py::object counted_in = row.dict("counted_in")) {
      table->add_state(std::move(counted_in));
      ++counted;
    }
    row.check_all_read();
  }
  if (counted && counted != rows.size()) throw py::value_error("some rows have counted_in, and others have not");
  return table;
}

py::object columns_of(const TensorReader& reader, const py::list& tensors) {
  py::list addresses, numels, dtypes;
  for (const py::handle tensor : tensors) {
    TensorReader::View view;
    if (!reader.read(tensor.ptr(), view)) return py::none();
    addresses.append(reinterpret_cast<uintptr_t>(view.address()));
    numels.append(view.numel);
    dtypes.append(static_cast<int>(view.dtype));
  }
  return py::make_tuple(addresses, numels, dtypes);
}

void bind_table(py::module_& module, const StateSpec (&states)[kMostStates], int least_states) {
  py::list described;
  for (int i = 0; i < kMostStates && states[i].name; ++i) {
    rule_states.specs[i] = states[i];
    rule_states.names[i] = PyUnicode_InternFromString(states[i].name);
    rule_states.most = i + 1;
    const char* const rounding = states[i].rounding == kAverage ? "average" : "nearest";
    described.append(py::make_tuple(states[i].name, states[i].sign == kSigned, rounding));
  }
  rule_states.least = least_states;
  module.attr("STATES") =
      py::tuple(described);  // of each its name, whether it is signed, and how it is rounded to bfloat16
  module.attr("LEAST_STATES") = least_states;
  // Each module has its own classes, since the other module may be of another version.
  bind_tensor_layout(module);
  py::class_<TensorReader>(module, "TensorReader", "Reads plain tensors of a device through torch's DLPack table.",
                           py::module_local())
      .def_readwrite("sharded_type", &TensorReader::sharded_type,
                     "DTensor, once there are any; its local tensors are read.")
      .def(py::init<const py::object&, const std::array<py::type, 2>&, const TensorLayout&, int32_t, int32_t>(),
           py::arg("capsule"), py::arg("types"), py::arg("layout"), py::arg("device_type") = kDlCpu,
           py::arg("device_id") = 0);
  py::class_<Table>(module, "Table", "The tensors of a step, as addresses, and their step counts.", py::module_local())
      .def("__len__", [](const Table& table) { return table.tensors.size(); })
      .def_readonly("first_state", &Table::first_state, "Where the dict of states has that of the first tensor.")
      .def_readonly("steps", &Table::steps, "The distinct step counts, this step included.")
      .def_property_readonly("counts_on_device", &Table::counts_on_device, "Whether step counts are in tensors.")
      .def_property_readonly("borrowed", &Table::borrowed, "The tensors that the table was made from.")
      .def_property_readonly("spans", &Table::spans, "Of each tensor the address, and how many bytes are used.")
      .def_readonly("sharded", &Table::sharded, "Whether there are DTensors among the params.")
      .def("count_writes", &Table::count_writes, py::arg("zero_grads"), "Bumps the versions of what a step writes.");
  module.def("grads_overlap", &grads_overlap, py::arg("tables"), "Whether grads share memory with one another.");
  module.def("columns_of", &columns_of, py::arg("reader"), py::arg("tensors"),
             "Addresses, sizes and dtype codes of tensors, or None if one of them is not plain.");
  module.def(
      "table_of_params", &table_of_params, py::arg("reader"), py::arg("params"), py::arg("states"),
      py::arg("state_count"), py::arg("master") = static_cast<int>(kNoMaster), py::arg("first_state") = 0,
      py::arg("rng_offset") = 0,
      "A table of the params that have a grad, kept alive with what belongs to them, or None if any of it is not "
      "eligible for the fast path. `state_count` is how many of the rule's states are in use. `first_state` is that of "
      "the group's last table: where to look for states first. `master` is a Master of csrc/tensor.h.");
  module.def("table_of_rows", &table_of_rows, py::arg("rows"), py::arg("state_count"),
             py::arg("master") = static_cast<int>(kNoMaster), py::arg("counts_on_device") = false,
             "A table of rows, dicts with the fields that csrc/python/table.h names, all trusted.");
  py::dict dtypes;
  for (int dtype = 0; dtype <= kQuantized; ++dtype) dtypes[kDtypes[dtype].name] = dtype;
  module.attr("DTYPES") = dtypes;
  module.attr("MASTERS") =
      py::dict(py::arg("NONE") = int{kNoMaster}, py::arg("FP32") = int{kMasterFp32},
               py::arg("REMAINDER_8") = int{kRemainder8}, py::arg("REMAINDER_16") = int{kRemainder16});
  module.attr("QUANTIZATION_BLOCK") = kQuantizationBlock;
  module.attr("MOST_STEPS") = kMostSteps;
}

}  // namespace adamops
