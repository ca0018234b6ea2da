// Test only: CUDA's half-precision conversions on the host, by the compiler's own _Float16. Must not know of the
// kernels.
#pragma once

#include <cstring>

using __half = _Float16;

inline float __half2float(__half a) {
  return static_cast<float>(a);
}
inline __half __float2half_rn(float a) {
  return static_cast<__half>(a);
}
inline __half __ushort_as_half(unsigned short bits) {
  __half a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
}
inline unsigned short __half_as_ushort(__half a) {
  unsigned short bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
}
