// Builds the table of a step: see python/table.h.
#include "python/table.h"

#include <algorithm>
#include <array>
#include <iterator>
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

Dtype dtype_of_number(const char* name, int count, size_t number) {
  if (number >= static_cast<size_t>(count))
    throw py::value_error(std::string(name) + " is " + std::to_string(number) + ", which is no dtype");
  return static_cast<Dtype>(number);
}

Master master_of_number(int number) {
  if (number < kNoMaster || number > kRemainder16)
    throw py::value_error("unknown kind of master " + std::to_string(number));
  return static_cast<Master>(number);
}

// Whether spans, in order of their addresses, overlap.
bool have_overlap(const std::vector<Table::Span>& sorted) {
  for (size_t i = 1; i < sorted.size(); ++i) {
    const auto& [begin, size] = sorted[i - 1];
    if (sorted[i].first < begin + static_cast<uintptr_t>(size)) return true;
  }
  return false;
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

  Dtype dtype(const char* name) { return dtype_of_number(name, kDtypeCount, number(name)); }
  Dtype state_dtype() { return dtype_of_number("state_dtype", kQuantized + 1, number("state_dtype")); }

  // The dtype of the 16-bit copy, which a row without one may leave out.
  Dtype lowp_dtype(bool is_needed) {
    return dtype_of_number("lowp_dtype", kDtypeCount,
                           is_needed ? number("lowp_dtype") : number("lowp_dtype", kFloat32));
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
    if (!objects_[row].state) continue;  // a table of lists
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

bool Table::add_to_grads(const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& added,
                         const std::vector<size_t>& added_dtypes) {
  std::unordered_map<uintptr_t, size_t> row_of_grad;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].numel && dtypes[i].grad == kFloat32)
      row_of_grad.emplace(reinterpret_cast<uintptr_t>(tensors[i].grad), i);
  std::vector<Added> all(tensors.size(), Added{nullptr, kFloat32});
  for (size_t i = 0; i < grads.size(); ++i) {
    const auto row = row_of_grad.find(grads[i]);
    if (row == row_of_grad.end()) return false;
    all[row->second] = {reinterpret_cast<const void*>(added.at(i)),
                        dtype_of_number("added_dtypes", kDtypeCount, added_dtypes.at(i))};
  }
  this->added = std::move(all);
  return true;
}

std::vector<Table::Span> Table::spans_of(int column) const {
  std::vector<Span> spans;
  spans.reserve(tensors.size());
  // A null address counts too: the tensor's storage was freed before its address was read.
  const auto add = [&spans](const void* address, int64_t size) {
    if (size) spans.emplace_back(reinterpret_cast<uintptr_t>(address), size);
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    const Dtypes& own = dtypes[i];
    if (column == kParam) {
      add(tensor.param, tensor.numel * size_of(own.param));
    } else if (column == kGrad) {
      add(tensor.grad, tensor.numel * size_of(own.grad));
    } else if (column == kMaster) {
      if (own.master != kNoMaster)
        add(tensor.master, tensor.numel * (own.master == kMasterFp32 ? 4 : own.master == kRemainder16 ? 2 : 1));
    } else if (column == kScales) {
      if (own.state == kQuantized) add(tensor.scales, blocks_of(tensor.numel) * state_count * 2);
    } else if (column == kLowpOut) {
      if (tensor.lowp_out) add(tensor.lowp_out, tensor.numel * size_of(own.lowp_out));
    } else {
      add(tensor.states[column - kFirstState], tensor.numel * size_of(own.state));
    }
  }
  return spans;
}

std::vector<Table::Span> Table::spans() const {
  std::vector<Span> spans;
  for (int column = kParam; column < kFirstState + state_count; ++column) {
    const std::vector<Span> own = spans_of(column);
    spans.insert(spans.end(), own.begin(), own.end());
  }
  for (const float* const count : device_steps) spans.emplace_back(reinterpret_cast<uintptr_t>(count), sizeof *count);
  return spans;
}

bool Table::writes_overlap(bool zero_grads) const {
  std::vector<Span> sorted;
  for (int column = kParam; column < kFirstState + state_count; ++column) {
    if (column == kGrad && !zero_grads) continue;
    // Most columns are in order already, as they were allocated one after another.
    std::vector<Span> own = spans_of(column), merged;
    if (!std::is_sorted(own.begin(), own.end())) std::sort(own.begin(), own.end());
    merged.reserve(sorted.size() + own.size());
    std::merge(sorted.begin(), sorted.end(), own.begin(), own.end(), std::back_inserter(merged));
    sorted.swap(merged);
  }
  if (have_overlap(sorted)) return true;
  if (zero_grads) return false;
  std::vector<Span> grads = spans_of(kGrad);  // may overlap one another, as nobody writes them
  if (!std::is_sorted(grads.begin(), grads.end())) std::sort(grads.begin(), grads.end());
  auto written = sorted.begin();
  for (const auto& [begin, size] : grads) {
    while (written != sorted.end() && written->first + static_cast<uintptr_t>(written->second) <= begin) ++written;
    if (written != sorted.end() && written->first < begin + static_cast<uintptr_t>(size)) return true;
  }
  return false;
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
    append(row.lowp_out);
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
  const bool is_sharded = reader.is_sharded(param);
  // The state's tensor of this name, or its local tensor if the param is sharded. Empty if there is none, or if only
  // one of the two is sharded.
  const auto state_tensor = [&](PyObject* name) {
    py::object tensor = owned_entry(state, name);
    if (!tensor || reader.is_sharded(tensor.ptr()) != is_sharded) return py::object();
    return is_sharded ? reader.local(tensor.ptr()) : tensor;
  };
  Candidate row;
  Objects& objects = row.objects;
  objects.param = py::reinterpret_borrow<py::object>(param);
  if (reader.is_sharded(grad.ptr()) != is_sharded) return false;
  if (is_sharded) {
    if (!reader.sharded_alike(param, grad.ptr())) return false;
    objects.param = reader.local(param);
    grad = reader.local(grad.ptr());
    sharded = true;
  }
  objects.grad = std::move(grad);
  objects.state = py::reinterpret_borrow<py::object>(state);
  objects.step = owned_entry(state, names().step);
  for (int i = 0; i < state_count; ++i) objects.states[i] = state_tensor(rule_states.names[i]);
  if (!read_states(reader, row)) return false;

  const Dtypes& own = row.dtypes;
  if (own.state == kQuantized) {
    objects.scales = owned_entry(state, names().scales);  // always plain: they belong to what this rank holds
  } else {
    // Scales next to floating-point states mean that someone took quantized states for plain numbers and cast them to
    // floats. Only looked for if the state has more entries than the step needs.
    const Py_ssize_t needed = 1 + state_count + (own.master != kNoMaster ? 1 : 0);
    if (PyDict_Size(state) > needed && entry(state, names().scales)) return false;
  }
  // Of a param that was of 16 bits before. This step makes them stale, so the slow path drops them.
  if (own.param == kFloat32 && master != kNoMaster && (entry(state, names().master) || entry(state, names().remainder)))
    return false;
  if (own.master != kNoMaster)
    objects.master = state_tensor(own.master == kMasterFp32 ? names().master : names().remainder);
  return add(reader, row, rng_offset);
}

bool Table::add(const TensorReader& reader, Objects objects, uint32_t rng_offset) {
  Candidate row;
  row.objects = std::move(objects);
  if (!read_states(reader, row)) return false;
  const bool needs_scales = row.dtypes.state == kQuantized, needs_master = row.dtypes.master != kNoMaster;
  if (needs_scales != bool(row.objects.scales) || needs_master != bool(row.objects.master)) return false;
  return add(reader, row, rng_offset);
}

bool Table::read_states(const TensorReader& reader, Candidate& row) const {
  const Objects& objects = row.objects;
  const auto has_shape = [&](const TensorReader::View& view) { return view.same_shape(row.param); };
  const auto read_all = [&](const auto& read_state) {
    for (int i = 0; i < state_count; ++i)
      if (!objects.states[i] || !read_state(i) || !has_shape(row.states[i])) return false;
    return true;
  };

  if (!reader.read(objects.param.ptr(), row.param)) return false;
  if (!reader.read(objects.grad.ptr(), row.grad) || !has_shape(row.grad)) return false;
  Dtype state_dtype = kFloat32;  // without states, any that kernels take
  if (read_all([&](int i) { return reader.read(objects.states[i].ptr(), row.states[i]); })) {
    if (state_count) state_dtype = row.states[0].dtype;
    for (int i = 0; i < state_count; ++i)
      if (row.states[i].dtype != state_dtype) return false;
  } else {
    const auto read_quantized = [&](int i) {
      return reader.read_integers(objects.states[i].ptr(), rule_states.specs[i].sign == kSigned, 8, row.states[i]);
    };
    if (!read_all(read_quantized)) return false;
    state_dtype = kQuantized;
  }
  row.dtypes = {row.param.dtype, row.grad.dtype, state_dtype, row.param.dtype == kFloat32 ? kNoMaster : master,
                kFloat32};
  return true;
}

bool Table::add(const TensorReader& reader, Candidate& row, uint32_t rng_offset) {
  const Objects& objects = row.objects;
  const auto is_like_param = [&](const TensorReader::View& view) { return view.same_shape(row.param); };
  Dtypes& own = row.dtypes;
  if (own.state == kQuantized) {
    if (!objects.scales || !reader.read(objects.scales.ptr(), row.scales)) return false;
    if (row.scales.dtype != kBfloat16 || row.scales.tensor.ndim != 2) return false;
    const int64_t* const shape = row.scales.tensor.shape;
    if (shape[0] != blocks_of(row.param.numel) || shape[1] != state_count) return false;
  }
  if (own.master != kNoMaster) {
    if (!objects.master) return false;
    PyObject* const found = objects.master.ptr();
    const bool is_read = own.master == kMasterFp32
                             ? reader.read(found, row.master) && row.master.dtype == kFloat32
                             : reader.read_integers(found, true, own.master == kRemainder8 ? 8 : 16, row.master);
    if (!is_read || !is_like_param(row.master)) return false;
  }
  if (objects.lowp_out) {
    if (!reader.read(objects.lowp_out.ptr(), row.lowp_out) || !is_like_param(row.lowp_out)) return false;
    own.lowp_out = row.lowp_out.dtype;
    if (own.lowp_out == kFloat32) return false;
  }
  if (!is_supported(own) || !add_step(reader, objects.step)) return false;

  Tensor tensor = {};
  tensor.param = row.param.address();
  tensor.grad = row.grad.address();
  written_.push_back(row.param.version);
  for (int i = 0; i < state_count; ++i) {
    tensor.states[i] = row.states[i].address();
    written_.push_back(row.states[i].version);
  }
  if (own.state == kQuantized) {
    tensor.scales = static_cast<uint16_t*>(row.scales.address());
    written_.push_back(row.scales.version);
  }
  if (own.master != kNoMaster) {
    tensor.master = row.master.address();
    written_.push_back(row.master.version);
  }
  if (objects.lowp_out) {
    tensor.lowp_out = row.lowp_out.address();
    written_.push_back(row.lowp_out.version);
  }
  grads_.push_back(row.grad.version);
  tensor.numel = row.param.numel;
  tensor.rng_offset = rng_offset;
  tensors.push_back(tensor);
  dtypes.push_back(own);
  objects_.push_back(std::move(row.objects));
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
  std::vector<Table::Span> spans;
  for (const Table* const table : tables) {
    const std::vector<Table::Span> own = table->spans_of(Table::kGrad);
    spans.insert(spans.end(), own.begin(), own.end());
  }
  std::sort(spans.begin(), spans.end());
  return have_overlap(spans);
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

std::unique_ptr<Table> table_of_lists(const TensorReader& reader, const py::list& params, const py::list& grads,
                                      const py::list& states, const py::object& step, const py::object& scales,
                                      const py::object& masters, const py::object& lowp_outs, int master,
                                      uint32_t rng_offset) {
  const int state_count = rule_states.checked_count(static_cast<int>(states.size()));
  auto table = std::make_unique<Table>(state_count, master_of_number(master));
  table->reserve(params.size());
  // A new reference to an entry of a list, empty for None and where there is no list.
  const auto item = [&params](const py::handle list, size_t i) {
    if (list.is_none()) return py::object();
    if (!PyList_Check(list.ptr()) || PyList_GET_SIZE(list.ptr()) != static_cast<Py_ssize_t>(params.size()))
      throw py::value_error("a table's lists are not lists of the same length");
    PyObject* const value = PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i));
    return value == Py_None ? py::object() : py::reinterpret_borrow<py::object>(value);
  };
  const bool has_one_count = PyLong_CheckExact(step.ptr());
  for (size_t i = 0; i < params.size(); ++i) {
    Table::Objects row;
    row.param = item(params, i);
    row.grad = item(grads, i);
    if (!row.grad) continue;
    if (!row.param) return nullptr;
    for (int s = 0; s < state_count; ++s) row.states[s] = item(PyList_GET_ITEM(states.ptr(), s), i);
    row.step = has_one_count ? step : item(step, i);
    row.scales = item(scales, i);
    row.master = item(masters, i);
    row.lowp_out = item(lowp_outs, i);
    if (!table->add(reader, std::move(row), rng_offset + static_cast<uint32_t>(i))) return nullptr;
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
      .def("writes_overlap", &Table::writes_overlap, py::arg("zero_grads"),
           "Whether tensors that a step writes share memory with one another.")
      .def("add_to_grads", &Table::add_to_grads, py::arg("grads"), py::arg("added"), py::arg("added_dtypes"),
           "Has the CPU op's step add grads to some in fp32, all given as addresses; False if it has none of the "
           "latter.")
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
  module.def("table_of_lists", &table_of_lists, py::arg("reader"), py::arg("params"), py::arg("grads"),
             py::arg("states"), py::arg("step"), py::arg("scales") = py::none(), py::arg("masters") = py::none(),
             py::arg("lowp_outs") = py::none(), py::arg("master") = static_cast<int>(kNoMaster),
             py::arg("rng_offset") = 0,
             "A table of lists of tensors, as long as `params`, or None if any of it is not eligible for the fast "
             "path. `states` has a list for each state in use. `step` is the count before this step, or a list.");
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
