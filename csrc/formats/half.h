// The 16-bit storage types. They are bits in memory only: vector wrappers widen them exactly, and narrow them with
// round-to-nearest-even.
#pragma once

#include <cstdint>

namespace adamops {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace adamops
