// Splits work over the threads that torch already has. Knows of OpenMP only the three entry points of the GNU ABI,
// which it looks up in the running process: adamops never brings an OpenMP runtime of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamops {

// Calls body(context, part) for every part in [0, parts), on as many of the process' OpenMP threads as it grants, and
// returns when all are done. Runs everything on the calling thread where the process has no OpenMP runtime. Every part
// runs with the default floating-point environment (nearest-even, subnormals kept), whatever the thread had set.
void parallel_for(int parts, void (*body)(void* context, int part), void* context);

template <class Body>
void parallel_for(int parts, const Body& body) {
  parallel_for(
      parts, [](void* context, int part) { (*static_cast<const Body*>(context))(part); }, const_cast<Body*>(&body));
}

// The file that holds the OpenMP runtime in use; empty where the process has none.
const char* openmp_runtime();

// Cuts the elements of a list of tensors, laid end to end, into parts of about the same size. A part starts at a
// multiple of kGrain elements of its tensor, so no two threads write to one cache line of it; and it depends on nothing
// but the sizes and the number of parts, so that each thread meets the same memory at every step.
class Partition {
 public:
  static constexpr int64_t kGrain = 256;

  Partition(const std::vector<int64_t>& sizes, int max_parts, int64_t least_elements_per_part);

  int parts() const { return parts_; }

  // Calls visit(tensor index, begin, end) for each piece of a tensor that belongs to the part, in order.
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

  std::vector<int64_t> starts_;  // of each tensor, in elements from the first; then the total
  int parts_;
};

}  // namespace adamops
