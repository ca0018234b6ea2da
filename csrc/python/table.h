// The table of a step: the tensors of a param group as addresses, sizes and dtypes. It is built from a list of params
// and their states, from lists of tensors, or from rows of addresses. Must not know of kernels, threads or
// hyper-parameters. The modules of the CPU op and of the CUDA op both contain it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "python/tensor_reader.h"
#include "rules/rule.h"
#include "tensor.h"

namespace adamops {

// More steps than anyone takes; the scalars' error bound ends long before (adamops/optim/hyper.py).
constexpr int64_t kMostSteps = int64_t{1} << 53;

// Tensors and what belongs to each, ready for the kernels.
class Table {
 public:
  Table(int state_count, Master master) : state_count(state_count), master(master) {}
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  int state_count;  // how many of the rule's states are in use
  Master master;    // what 16-bit params must have
  std::vector<Tensor> tensors;
  std::vector<Dtypes> dtypes;
  std::vector<int64_t> steps;        // the distinct step counts, this step included
  std::vector<uint32_t> step_rows;   // for each tensor, the index of its count in `steps`
  std::vector<float*> device_steps;  // or the address of each tensor's fp32 count, before this step
  struct Added {
    const void* grad;
    Dtype dtype;
  };
  std::vector<Added> added;    // for each tensor, a grad that the CPU op adds to its own; null for none. Or empty
  Py_ssize_t first_state = 0;  // the first tensor's position in the dict of states, as PyDict_Next counts

  void reserve(size_t count);

  // Has the CPU op add grads of any dtype to those of some tensors in fp32, which it leaves as they are. All are given
  // as addresses. Returns false, and does nothing, if one of the former is of no tensor.
  bool add_to_grads(const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& added,
                    const std::vector<size_t>& added_dtypes);

  // Records a tensor's step count, this step included.
  void add_step(int64_t step);

  // Whether step counts are kept in tensors, on the params' device.
  bool counts_on_device() const { return !device_steps.empty(); }

  // Writes the step counts into the states that the table was made from, if any. Counts on the device are left alone.
  void count_steps() const;

  // Tells autograd what the step writes, by version counters; with `zero_grads`, the grads too. Does nothing when
  // called again, or for a table made from rows.
  void count_writes(bool zero_grads);

  // All tensors whose memory the table borrows; for DTensors, the local ones.
  pybind11::list borrowed() const;

  // Where a step reads or writes, and how many bytes.
  using Span = std::pair<uintptr_t, int64_t>;

  // The spans of all tensors of all columns.
  std::vector<Span> spans() const;

  // Those of the tensors in one column that have any bytes.
  enum Column { kParam, kGrad, kMaster, kScales, kLowpOut, kFirstState };  // the other states follow
  std::vector<Span> spans_of(int column) const;

  // Whether any of the tensors that a step writes share memory with one another or with a grad: the threads of a step
  // would race on it. Counts on the device are not looked at.
  bool writes_overlap(bool zero_grads) const;

  // For a table made from rows: keeps the dict that a tensor's step count is written to.
  void add_state(pybind11::object state);

  // The Python objects whose memory this table borrows, kept alive; one member per column. For DTensors, the local
  // ones.
  struct Objects {
    pybind11::object param, grad, state, step, states[kMostStates], scales, master, lowp_out;
  };

  // Adds one param with its grad and its state; for a DTensor, what this rank holds. Returns false if anything about
  // them is not eligible for the fast path.
  bool add(const TensorReader& reader, PyObject* param, pybind11::object grad, PyObject* state, uint32_t rng_offset);

  // Adds one param with what belongs to it, which is in no dict. Returns false as above.
  bool add(const TensorReader& reader, Objects objects, uint32_t rng_offset);

  // Releases the references to the tensors.
  void release() {
    written_.clear();
    grads_.clear();
    objects_.clear();
  }

  bool sharded = false;  // whether there are DTensors among the params

 private:
  // A row while its tensors are proved: as Python objects, and as the reader sees them.
  struct Candidate {
    Objects objects;
    TensorReader::View param, grad, states[kMostStates] = {}, scales{}, master{}, lowp_out{};
    Dtypes dtypes;
  };

  // Reads the param, grad and states of a row, and sets its dtypes. Returns false if they do not belong together.
  bool read_states(const TensorReader& reader, Candidate& row) const;

  // Reads the other tensors of the row, and adds it.
  bool add(const TensorReader& reader, Candidate& row, uint32_t rng_offset);

  // Records a step count as found in the state. Returns false if it is not eligible for the fast path, or if some
  // counts are numbers and others tensors.
  bool add_step(const TensorReader& reader, const pybind11::object& step);

  std::vector<Objects> objects_;
  std::vector<VersionCounter*> written_, grads_;       // of a table made from params; the objects keep them alive
  std::unordered_map<int64_t, uint32_t> row_of_step_;  // the index of each in `steps`
};

// The table of a list of params (those without a grad are left out) and their states, {param: {"step", ...}}. Null, so
// None in Python, if any of it is not eligible for the fast path (a state is missing, a tensor is not plain or does not
// fit its param); the caller then finds the offending parameter. `first_state` is that of the group's previous table, 0
// if unknown. The params' own RNG offsets are `rng_offset` and the numbers after it.
std::unique_ptr<Table> table_of_params(const TensorReader& reader, const pybind11::list& params,
                                       const pybind11::dict& states, int state_count, int master,
                                       Py_ssize_t first_state, uint32_t rng_offset);

// The table of lists of tensors, as long as `params`: `states` has one list for each state in use. A param with None as
// its grad is left out. `step` is the count before this step, or a list of them. Entries of the last three lists, or
// the lists themselves, are None for what a param does not have. Null as above.
std::unique_ptr<Table> table_of_lists(const TensorReader& reader, const pybind11::list& params,
                                      const pybind11::list& grads, const pybind11::list& states,
                                      const pybind11::object& step, const pybind11::object& scales,
                                      const pybind11::object& masters, const pybind11::object& lowp_outs, int master,
                                      uint32_t rng_offset);

// The table of rows, dicts with named fields, whose addresses are trusted:
//   param, grad, states               addresses; `states` are as many as state_count
//   numel
//   param_dtype, grad_dtype, state_dtype     numbers of Dtype; lowp_dtype too if there is a lowp_out
//   step                              the count, this step included; or the address of the count before this step
//   master, scales, lowp_out          addresses; 0, None or left out for what the tensor does not have
//   rng_offset                        0 if left out
//   counted_in                        the dict that the step count is written to; in all rows or in none
std::unique_ptr<Table> table_of_rows(const pybind11::list& rows, int state_count, int master, bool counts_on_device);

// Whether grads of the tables share memory with one another, so that none may be zeroed before all have been read.
bool grads_overlap(const std::vector<const Table*>& tables);

// The addresses, sizes and dtype codes of tensors, one list each; None if any of them is not plain.
pybind11::object columns_of(const TensorReader& reader, const pybind11::list& tensors);

// Binds TensorReader, Table and the functions above, local to the module, whose rule has these states.
void bind_table(pybind11::module_& module, const StateSpec (&states)[kMostStates], int least_states);

}  // namespace adamops
