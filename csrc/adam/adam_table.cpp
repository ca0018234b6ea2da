// How the table of a step is made: see adam_table.h.
#include "adam_table.h"

#include <algorithm>
#include <string>

#include "../column.h"

namespace py = pybind11;

namespace adamops {

namespace {

// The names in a param's state, made once.
struct Names {
  PyObject *grad, *step, *exp_avg, *exp_avg_sq, *max_exp_avg_sq;

  Names()
      : grad(PyUnicode_InternFromString("grad")),
        step(PyUnicode_InternFromString("step")),
        exp_avg(PyUnicode_InternFromString("exp_avg")),
        exp_avg_sq(PyUnicode_InternFromString("exp_avg_sq")),
        max_exp_avg_sq(PyUnicode_InternFromString("max_exp_avg_sq")) {}
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

// Finds the states of params one after another. The dict of states usually has them in the order of the params, and
// then comparing a pointer takes the place of torch's hash of a tensor, which is a function in Python.
class StateFinder {
 public:
  // `position` is where to look first, as PyDict_Next counts; any number is safe.
  StateFinder(PyObject* states, Py_ssize_t position) : states_(states), next_(position) {}

  // How far to look for params after the first: far enough to get over some that have no grad.
  static constexpr Py_ssize_t kReach = 4;

  // The state of a param, borrowed; null if there is none. Looks at `reach` entries before it asks for a hash.
  PyObject* find(PyObject* param, Py_ssize_t reach) {
    Py_ssize_t position = next_;
    PyObject *key, *state;
    for (; reach > 0; --reach) {
      found_ = position;
      if (!PyDict_Next(states_, &position, &key, &state)) break;
      if (key == param) {
        next_ = position;
        return state;
      }
    }
    return entry(states_, param);
  }

  // Where the last state was found, if it was without a hash.
  Py_ssize_t found() const { return found_; }

 private:
  PyObject* states_;
  Py_ssize_t next_, found_ = 0;
};

}  // namespace

void AdamTable::reserve(size_t count) {
  tensors.reserve(count);
  dtypes.reserve(count);
  step_rows.reserve(count);
  objects_.reserve(count);
}

void AdamTable::add_step(int64_t step) {
  if (step_rows.empty() || steps[step_rows.back()] != step) {
    const auto found = std::find(steps.begin(), steps.end(), step);
    step_rows.push_back(static_cast<uint32_t>(found - steps.begin()));
    if (found == steps.end()) steps.push_back(step);
  } else {
    step_rows.push_back(step_rows.back());
  }
}

void AdamTable::count_steps() const {
  std::vector<py::int_> counts(steps.begin(), steps.end());
  for (size_t row = 0; row < objects_.size(); ++row) {
    if (PyDict_SetItem(objects_[row].state.ptr(), names().step, counts[step_rows[row]].ptr()) != 0)
      throw py::error_already_set();
  }
}

bool AdamTable::add(const TensorReader& reader, PyObject* param, py::object grad, PyObject* state) {
  if (!state || !PyDict_Check(state)) return false;
  TensorReader::View p, g, m, v, max_v;
  Objects row;
  row.grad = std::move(grad);
  row.state = py::reinterpret_borrow<py::object>(state);
  PyObject* const step = entry(state, names().step);
  if (!step || !PyLong_CheckExact(step)) return false;
  row.exp_avg = owned_entry(state, names().exp_avg);
  row.exp_avg_sq = owned_entry(state, names().exp_avg_sq);
  if (amsgrad) row.max_exp_avg_sq = owned_entry(state, names().max_exp_avg_sq);

  const auto read = [&](const py::object& object, TensorReader::View& view) {
    return object && reader.read(object.ptr(), view) && view.same_shape(p);
  };
  if (!reader.read(param, p) || !read(row.grad, g) || !read(row.exp_avg, m) || !read(row.exp_avg_sq, v)) return false;
  if (amsgrad && (!read(row.max_exp_avg_sq, max_v) || max_v.dtype != m.dtype)) return false;
  const bool grad_fits = g.dtype == p.dtype || g.dtype == kFloat32;
  const bool states_fit = v.dtype == m.dtype && (m.dtype == p.dtype || m.dtype == kFloat32);
  if (!grad_fits || !states_fit) return false;

  const long long done = PyLong_AsLongLong(step);
  if (done == -1 && PyErr_Occurred()) throw py::error_already_set();
  add_step(done + 1);
  tensors.push_back({p.address(), g.address(), m.address(), v.address(), amsgrad ? max_v.address() : nullptr, p.numel});
  dtypes.push_back({p.dtype, g.dtype, m.dtype});
  row.param = py::reinterpret_borrow<py::object>(param);
  objects_.push_back(std::move(row));
  return true;
}

std::unique_ptr<AdamTable> table_of_params(const TensorReader& reader, const py::list& params, const py::dict& states,
                                           bool amsgrad, Py_ssize_t first_state) {
  auto table = std::make_unique<AdamTable>(amsgrad);
  table->reserve(params.size());
  StateFinder finder(states.ptr(), first_state);
  // The list is asked for its size each time, as reading a grad may run code of others.
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* const param = PyList_GET_ITEM(params.ptr(), static_cast<Py_ssize_t>(i));
    if (!reader.is_plain(param)) return nullptr;
    auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, names().grad));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    const bool first = table->tensors.empty();
    PyObject* const state = finder.find(param, first ? PyDict_Size(states.ptr()) : StateFinder::kReach);
    if (!table->add(reader, param, std::move(grad), state)) return nullptr;
    if (first) table->first_state = finder.found();
  }
  return table;
}

std::unique_ptr<AdamTable> table_of_addresses(const py::list& params, const py::list& grads, const py::list& exp_avgs,
                                              const py::list& exp_avg_sqs, const py::object& max_exp_avg_sqs,
                                              const py::list& numels, const py::list& dtypes, const py::list& steps) {
  const size_t count = params.size();
  const bool amsgrad = !max_exp_avg_sqs.is_none();
  const py::list max_list = amsgrad ? py::list(max_exp_avg_sqs) : params;
  const Column param(params, count, "params"), grad(grads, count, "grads"), exp_avg(exp_avgs, count, "exp_avgs"),
      exp_avg_sq(exp_avg_sqs, count, "exp_avg_sqs"), max_exp_avg_sq(max_list, count, "max_exp_avg_sqs"),
      numel(numels, count, "numels"), code(dtypes, count, "dtypes"), step(steps, count, "steps");
  auto table = std::make_unique<AdamTable>(amsgrad);
  table->reserve(count);
  for (size_t i = 0; i < count; ++i) {
    if (code[i] >= kDtypeCount * kDtypeCount * kDtypeCount)
      throw py::value_error("unknown dtype code " + std::to_string(code[i]));
    table->dtypes.push_back({static_cast<Dtype>(code[i] % kDtypeCount),
                             static_cast<Dtype>(code[i] / kDtypeCount % kDtypeCount),
                             static_cast<Dtype>(code[i] / kDtypeCount / kDtypeCount)});
    table->tensors.push_back({param.pointer<void>(i), grad.pointer<const void>(i), exp_avg.pointer<void>(i),
                              exp_avg_sq.pointer<void>(i), amsgrad ? max_exp_avg_sq.pointer<void>(i) : nullptr,
                              static_cast<int64_t>(numel[i])});
    table->add_step(static_cast<int64_t>(step[i]));
  }
  return table;
}

}  // namespace adamops
