// What a vector wrapper may require of the CPU. Names only; runtime/cpu_features.cpp detects which of them this machine
// has.
#pragma once

#include <cstdint>

namespace adamops {

enum Feature : uint32_t {
  kNoFeatures = 0,
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512dq = 1u << 5,
  kAvx512vl = 1u << 6,
};

// The features that this CPU has and whose registers the operating system saves.
uint32_t cpu_features();

// The software prefetch distance for this CPU in bytes; 0 means no software prefetch. The best value depends on the
// hardware prefetchers, which differ between vendors; measured in docs/dev/decisions.md.
int prefetch_distance_bytes();

}  // namespace adamops
