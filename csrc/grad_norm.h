// How the norm of grads is summed, on every device: in double, in 32 lanes over chunks, each element in the lane of its
// index modulo 32. Then the lanes of a chunk are added in order, and the chunks in order. A full chunk is read as four
// interleaved streams, since a thread gets more memory bandwidth from several streams than from one; a shorter chunk is
// read from begin to end. Shared by code compiled for different CPUs, so no function here has external linkage
// (cpu/vector_blocks.h says why).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamops {

enum Norm : uint8_t { kNorm1, kNorm2, kNormInf };

// Elements of a tensor that are summed on their own, wherever they are and whichever thread does it.
constexpr int64_t kNormChunk = 32768;
constexpr int64_t kNormLanes = 32, kNormStreams = 4;

namespace {

// Maps reading order to memory order: where in a full chunk the elements are that are read after the first `begin`.
ADAMOPS_HOST_DEVICE inline int64_t norm_index(int64_t begin) {
  const int64_t turn = begin / kNormLanes;
  return turn % kNormStreams * (kNormChunk / kNormStreams) + turn / kNormStreams * kNormLanes;
}

}  // namespace
}  // namespace adamops
