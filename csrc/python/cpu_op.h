// What the Python modules of the CPU ops share: selecting one of the SIMD targets in the binary, and splitting tensors
// over torch's threads. Must not know what an op computes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "python/gil.h"
#include "runtime/cpu_features.h"
#include "runtime/float_environment.h"
#include "runtime/parallel.h"

// Declares `const Target target` in the namespace of each SIMD target of the build, to be defined by the kernel's
// source, and lists the targets. The build (op_builder/simd.py) supplies ADAMOPS_TARGETS(X), best target first:
// X(avx512) X(avx2) X(baseline), for example. Use in namespace adamops, with ADAMOPS_TARGET_TYPE defined.
#define ADAMOPS_DECLARE_TARGET(name)       \
  namespace name {                         \
  extern const ADAMOPS_TARGET_TYPE target; \
  }
#define ADAMOPS_TARGET_ADDRESS(name) &name::target,

namespace adamops {

// The SIMD targets of an op, and the one in use. A Target has a `name` and its `required_features`
// (runtime/cpu_features.h).
template <class Target>
class SimdTargets {
 public:
  explicit SimdTargets(std::initializer_list<const Target*> best_first) : all_(best_first) {}

  const Target& in_use() const { return *in_use_.load(); }

  // Selects the best target for this CPU, and binds the functions that list and change targets.
  void bind(pybind11::module_& module) {
    in_use_ = best();
    if (!in_use_.load()) throw pybind11::import_error("this op was built without a SIMD target that this CPU can run");
    module.def("targets", [this] { return names(false); }, "The SIMD targets in this build, best first.");
    module.def(
        "supported_targets", [this] { return names(true); }, "Those of targets() that this CPU can run, best first.");
    module.def("target", [this] { return in_use().name; }, "The SIMD target in use.");
    module.def(
        "use_target", [this](const std::string& name) { use(name); }, pybind11::arg("name"),
        "Chooses a SIMD target; ValueError if it cannot run here.");
    module.def("openmp_runtime", &openmp_runtime, "The file of the OpenMP runtime in use; empty if there is none.");
    module.attr("DEFAULT_FLOAT_CONTROL") = kDefaultFloatControl;
    module.def("set_float_control", &set_float_control, pybind11::arg("value"),
               "Sets the calling thread's floating-point control register, and returns what it was.");
  }

 private:
  static bool runs_here(const Target& target) { return (target.required_features & ~cpu_features()) == 0; }

  const Target* best() const {
    for (const Target* target : all_)
      if (runs_here(*target)) return target;
    return nullptr;
  }

  std::vector<std::string> names(bool only_supported) const {
    std::vector<std::string> names;
    for (const Target* target : all_)
      if (!only_supported || runs_here(*target)) names.emplace_back(target->name);
    return names;
  }

  void use(const std::string& name) {
    std::string names;
    for (const Target* target : all_) {
      if (name == target->name) {
        if (!runs_here(*target)) throw pybind11::value_error("this CPU cannot run the SIMD target '" + name + "'");
        in_use_ = target;
        return;
      }
      names += std::string(names.empty() ? "" : ", ") + target->name;
    }
    throw pybind11::value_error("no SIMD target '" + name + "' in this build; it has: " + names);
  }

  std::vector<const Target*> all_;
  std::atomic<const Target*> in_use_{nullptr};
};

// Below this, waking a thread costs more than it saves (measured: docs/dev/decisions.md).
constexpr int64_t kLeastElementsPerPart = 8192;

// Calls visit(tensor index, begin, end) until it has covered all elements of tensors of these sizes, on at most
// `threads` threads and without the GIL.
template <class Visit>
void for_each_piece(const std::vector<int64_t>& sizes, int threads, const Visit& visit) {
  const GilRelease release;
  const Partition partition(sizes, threads, kLeastElementsPerPart);
  parallel_for(partition.parts(), [&](int part) { partition.for_each(part, visit); });
}

}  // namespace adamops
