// The table of a step: the tensors of a param group as addresses, sizes and dtypes, made from a list of params and
// their states or from columns of addresses. It must not know of kernels, threads or hyper-parameters. The modules of
// the CPU op and of the CUDA op both hold it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../tensor_reader.h"
#include "adam_tensor.h"

namespace adamops {

// More steps than anyone takes; the scalars' error bound ends long before (adamops/ops/adam/hyper.py).
constexpr int64_t kMostSteps = int64_t{1} << 53;

// Tensors with what belongs to each, ready for the kernels.
class AdamTable {
 public:
  AdamTable(bool amsgrad, Master master) : amsgrad(amsgrad), master(master) {}
  AdamTable(const AdamTable&) = delete;
  AdamTable& operator=(const AdamTable&) = delete;

  bool amsgrad;   // of its own, since an empty tensor has a null address in every column
  Master master;  // what 16-bit params must have
  std::vector<AdamTensor> tensors;
  std::vector<AdamDtypes> dtypes;
  std::vector<int64_t> steps;        // the distinct step counts, this step included
  std::vector<uint32_t> step_rows;   // for each tensor, which of `steps` it has reached
  std::vector<float*> device_steps;  // or where each tensor's count, before this step, is kept as fp32
  Py_ssize_t first_state = 0;        // where the dict of states has that of the first tensor, as PyDict_Next counts

  void reserve(size_t count);

  // Notes a tensor's step count, this step included.
  void add_step(int64_t step);

  // Whether step counts are kept in tensors, beside the params.
  bool counts_on_device() const { return !device_steps.empty(); }

  // Writes the step counts into the states that the table was made from, if it was; counts on the device are left.
  void count_steps() const;

  // Has autograd know what the step writes, of a table made from params: for `zero_grads` the grads too.
  void count_writes(bool zero_grads) const;

  // All tensors that the table borrows memory of; of DTensors the local ones.
  pybind11::list borrowed() const;

  // Where each tensor of each column begins, and how many bytes of it a step reads or writes.
  std::vector<std::pair<uintptr_t, int64_t>> spans() const;

  // Remembers the dict that a tensor's step count is to be written to, of a table made from addresses.
  void add_state(pybind11::object state);

  // Takes one param with its grad and its state, of a DTensor what this rank holds. False if something about them is
  // not eligible for the fast path.
  bool add(const TensorReader& reader, PyObject* param, pybind11::object grad, PyObject* state, uint32_t rng_offset);

  // Releases the references to the tensors.
  void release() {
    written_.clear();
    grads_.clear();
    objects_.clear();
  }

  bool sharded = false;  // whether there are DTensors among the params

 private:
  // Notes a step count as the state has it. False if it is not eligible for the fast path, or kept elsewhere than those
  // before.
  bool add_step(const TensorReader& reader, const pybind11::object& step);

  // What Python owns and this table borrows the memory of, kept alive; a member a column. Of DTensors the local ones.
  struct Objects {
    pybind11::object param, grad, state, step, exp_avg, exp_avg_sq, max_exp_avg_sq, scales, master;
  };
  std::vector<Objects> objects_;
  std::vector<VersionCounter*> written_, grads_;       // of a table made from params; the objects keep them
  std::unordered_map<int64_t, uint32_t> row_of_step_;  // where `steps` has each
};

// The table of a list of params, those without grad left out, and their states, {param: {"step", "exp_avg", ...}}. None
// if any of it is not eligible for the fast path (a state is missing, a tensor is not plain or does not fit its param):
// then it is for the caller to find the offending parameter. `first_state` is that of the group's last table, 0 if
// unknown; the random bits of the params come from `rng_offset` and the numbers after it.
std::unique_ptr<AdamTable> table_of_params(const TensorReader& reader, const pybind11::list& params,
                                           const pybind11::dict& states, bool amsgrad, int master,
                                           Py_ssize_t first_state, uint32_t rng_offset);

// The table of columns, which are trusted. A dtype code is param + 3 * grad + 9 * state + 36 * lowp_out, where the
// dtype 3 is that of codes; steps are counts, this one included, or addresses of counts, it not included; a master of 0
// is none. Columns that are None are those that no tensor has. `states` are the dicts that counts are written to.
std::unique_ptr<AdamTable> table_of_addresses(const pybind11::list& params, const pybind11::list& grads,
                                              const pybind11::list& exp_avgs, const pybind11::list& exp_avg_sqs,
                                              const pybind11::object& max_exp_avg_sqs, const pybind11::list& numels,
                                              const pybind11::list& dtypes, const pybind11::list& steps,
                                              const pybind11::object& masters, bool counts_on_device, int master,
                                              const pybind11::object& scales, const pybind11::object& lowp_outs,
                                              const pybind11::object& rng_offsets, const pybind11::object& states);

// Whether grads of the tables share memory with one another, so that none may be zeroed before all are read.
bool grads_overlap(const std::vector<const AdamTable*>& tables);

// The addresses, sizes and dtype codes of tensors, each a list; None if one of them is not plain.
pybind11::object columns_of(const TensorReader& reader, const pybind11::list& tensors);

// Makes Python know TensorReader, AdamTable and the functions above, as the module's own.
void bind_adam_table(pybind11::module_& module);

}  // namespace adamops
