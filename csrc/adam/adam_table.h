// The table of a step: the tensors of a param group as addresses, sizes and dtypes, made from a list of params and
// their states or from columns of addresses. It must not know of kernels, threads or hyper-parameters.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "../tensor_reader.h"
#include "cpu_adam_kernel.h"

namespace adamops {

// The dtypes of a tensor's param, grad and states.
struct Dtypes {
  Dtype param, grad, state;
};

// Tensors with what belongs to each, ready for the kernels.
class AdamTable {
 public:
  explicit AdamTable(bool amsgrad) : amsgrad(amsgrad) {}
  AdamTable(const AdamTable&) = delete;
  AdamTable& operator=(const AdamTable&) = delete;

  bool amsgrad;  // of its own, since an empty tensor has a null address in every column
  std::vector<AdamTensor> tensors;
  std::vector<Dtypes> dtypes;
  std::vector<int64_t> steps;       // the distinct step counts, this step included
  std::vector<uint32_t> step_rows;  // for each tensor, which of `steps` it has reached
  Py_ssize_t first_state = 0;       // where the dict of states has that of the first tensor, as PyDict_Next counts

  void reserve(size_t count);

  // Notes a tensor's step count.
  void add_step(int64_t step);

  // Writes the step counts into the states that the table was made from, if it was.
  void count_steps() const;

  // Takes one param with its grad and its state. False if something about them is out of the ordinary.
  bool add(const TensorReader& reader, PyObject* param, pybind11::object grad, PyObject* state);

  // Lets go of the tensors.
  void release() { objects_.clear(); }

 private:
  // What Python owns and this table borrows the memory of, kept alive; a member a column.
  struct Objects {
    pybind11::object param, grad, state, exp_avg, exp_avg_sq, max_exp_avg_sq;
  };
  std::vector<Objects> objects_;
};

// The table of a list of params, those without grad left out, and their states, {param: {"step", "exp_avg", ...}}. None
// if any of it is out of the ordinary (a state is missing, a tensor is not plain or does not fit its param): then it is
// for the caller to find out what is the matter. `first_state` is that of the group's last table, 0 if unknown.
std::unique_ptr<AdamTable> table_of_params(const TensorReader& reader, const pybind11::list& params,
                                           const pybind11::dict& states, bool amsgrad, Py_ssize_t first_state);

// The table of columns, which are trusted. A dtype code is param + 3 * grad + 9 * state; steps include this one.
std::unique_ptr<AdamTable> table_of_addresses(const pybind11::list& params, const pybind11::list& grads,
                                              const pybind11::list& exp_avgs, const pybind11::list& exp_avg_sqs,
                                              const pybind11::object& max_exp_avg_sqs, const pybind11::list& numels,
                                              const pybind11::list& dtypes, const pybind11::list& steps);

}  // namespace adamops
