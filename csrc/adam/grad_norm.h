// How the norm of grads is added up, on every device: in double, in 32 lanes over chunks, each element in the lane of
// its place; then the lanes of a chunk in order, and the chunks in order. Shared by code compiled for different CPUs:
// plain data.
#pragma once

#include <cstdint>

namespace adamops {

enum Norm : uint8_t { kNorm1, kNorm2, kNormInf };

// Elements of a tensor that are added up by themselves, wherever they are and whichever thread does it.
constexpr int64_t kNormChunk = 32768;

}  // namespace adamops
