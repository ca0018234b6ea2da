// Splits work over the threads that torch already has. Must not know more of OpenMP than the three entry points of the
// GNU ABI, looked up in the running process: adamops never brings an OpenMP runtime of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamops {

// Calls body(context, part) for every part in [0, parts), and returns when all are done. Uses as many of the process's
// OpenMP threads as the runtime grants; without an OpenMP runtime, everything runs on the calling thread. Every part
// runs in the default floating-point environment (nearest-even, subnormals kept), whatever the thread had set.
void parallel_for(int parts, void (*body)(void* context, int part), void* context);

template <class Body>
void parallel_for(int parts, const Body& body) {
  parallel_for(
      parts, [](void* context, int part) { (*static_cast<const Body*>(context))(part); }, const_cast<Body*>(&body));
}

// The file of the OpenMP runtime in use; empty if the process has none.
const char* openmp_runtime();

// Splits the elements of a list of tensors, laid end to end, into parts of about equal size. A part starts at a
// multiple of kGrain elements of its tensor, so that no two threads write to the same cache line of it. The split
// depends only on the sizes and the number of parts, so that each thread works on the same memory at every step.
class Partition {
 public:
  static constexpr int64_t kGrain = 256;

  Partition(const std::vector<int64_t>& sizes, int max_parts, int64_t least_elements_per_part);

  int parts() const { return parts_; }

  // Calls visit(tensor index, begin, end), in order, for each piece of a tensor that belongs to the part.
  template <class Visit>
  void for_each(int part, const Visit& visit) const {
    Position from = position(part);
    const Position to = position(part + 1);
    for (; from.tensor < to.tensor; from = {from.tensor + 1, 0}) {
      const int64_t size = starts_[from.tensor + 1] - starts_[from.tensor];
      if (from.element < size) visit(from.tensor, from.element, size);
    }
    if (from.element < to.element) visit(from.tensor, from.element, to.element);
  }

 private:
  struct Position {
    size_t tensor;
    int64_t element;
  };
  Position position(int part) const;

  std::vector<int64_t> starts_;  // of each tensor, in elements from the first tensor; then the total
  int parts_;
};

}  // namespace adamops
