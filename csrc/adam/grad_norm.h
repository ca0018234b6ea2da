// How the norm of grads is added up, on every device: in double, in 32 lanes over chunks, each element in the lane of
// its place; then the lanes of a chunk in order, and the chunks in order. A whole chunk is read at four places by
// turns, as memory gives one thread more of several streams than of one; a shorter one from its begin to its end.
// Shared by code compiled for different CPUs, so no function here has external linkage (simd/blocks.h says why).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace adamops {

enum Norm : uint8_t { kNorm1, kNorm2, kNormInf };

// Elements of a tensor that are added up by themselves, wherever they are and whichever thread does it.
constexpr int64_t kNormChunk = 32768;
constexpr int64_t kNormLanes = 32, kNormStreams = 4;

namespace {

// Where in a whole chunk the elements are that come in the turn of those from `begin` on.
ADAMOPS_HOST_DEVICE inline int64_t norm_turn(int64_t begin) {
  const int64_t turn = begin / kNormLanes;
  return turn % kNormStreams * (kNormChunk / kNormStreams) + turn / kNormStreams * kNormLanes;
}

}  // namespace
}  // namespace adamops
