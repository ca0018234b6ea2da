// The bits of a float as an integer, and back. Included by kernels, which are compiled once per SIMD target, so nothing
// here has external linkage (cpu/vector_blocks.h says why).
#pragma once

#include <cstdint>
#include <cstring>

namespace adamops {
namespace {

inline uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}

}  // namespace
}  // namespace adamops
