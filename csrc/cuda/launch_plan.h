// Which tensor goes into which launch of the CUDA kernel, and which thread blocks work on it. Plain C++: must not know
// of CUDA or Python, so that it can be tested without either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamops {

// A tensor as the plan sees it. A launch takes tensors of one kind only.
struct PlannedTensor {
  int64_t numel;
  uint32_t kind;
};

// One launch: tensors by their index in the planned list, and for each the first of its thread blocks, one per chunk of
// elements. first_block has one more entry: the number of thread blocks.
struct PlannedLaunch {
  uint32_t kind;
  std::vector<uint32_t> tensors;
  std::vector<uint32_t> first_block;

  uint32_t blocks() const { return first_block.back(); }
};

struct LaunchLimits {
  size_t tensors;   // most that fit in the table of a launch
  int64_t chunk;    // elements per thread block
  uint32_t blocks;  // most thread blocks of a launch
};

// Covers every element of every tensor exactly once, in order within a kind. Kinds come in the order of their first
// tensor; empty tensors are left out. Throws std::length_error for a tensor that needs more thread blocks than a launch
// may have.
std::vector<PlannedLaunch> plan_launches(const std::vector<PlannedTensor>& tensors, const LaunchLimits& limits);

}  // namespace adamops
