// Which tensor goes into which launch of the CUDA kernel, and which blocks work on it. Plain C++: it must not know of
// CUDA nor of Python, so it is tested without either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace adamops {

// A tensor as the plan sees it: only tensors of one kind go into one launch.
struct PlannedTensor {
  int64_t numel;
  uint32_t kind;
};

// One launch: tensors, by their index in the list that was planned, and for each the first of the blocks that work on
// it, a block for each chunk of elements. first_block has one entry more: the number of blocks.
struct PlannedLaunch {
  uint32_t kind;
  std::vector<uint32_t> tensors;
  std::vector<uint32_t> first_block;

  uint32_t blocks() const { return first_block.back(); }
};

struct LaunchLimits {
  size_t tensors;   // that fit in the table of a launch
  int64_t chunk;    // elements a block
  uint32_t blocks;  // that a launch may have
};

// Covers every element of every tensor exactly once, in order within a kind; kinds come in order of their first tensor,
// and empty tensors nowhere. Throws std::length_error for a tensor that needs more blocks than a launch may have.
std::vector<PlannedLaunch> plan_launches(const std::vector<PlannedTensor>& tensors, const LaunchLimits& limits);

}  // namespace adamops
