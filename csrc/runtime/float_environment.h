// The floating-point control register of the calling thread. A program may flush subnormals to zero
// (torch.set_flush_denormal does), or change the rounding mode, in one thread only. Results must not depend on it.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace adamops {

// Round to nearest even, subnormals kept, no traps.
#if defined(__SSE2__)
constexpr uint64_t kDefaultFloatControl = 0x1F80;
#else
constexpr uint64_t kDefaultFloatControl = 0;
#endif

// Sets the control register and returns its former value. Does nothing on architectures other than x86-64 and AArch64.
inline uint64_t set_float_control([[maybe_unused]] uint64_t value) {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  _mm_setcsr(static_cast<unsigned>(value));
  return before;
#elif defined(__aarch64__)
  // Not GCC's __builtin_aarch64_get_fpcr, which Clang does not have.
  uint64_t before;
  asm volatile("mrs %0, fpcr" : "=r"(before));
  asm volatile("msr fpcr, %0" : : "r"(value));
  return before;
#else
  return 0;
#endif
}

// Sets the default environment for the lifetime of the object. Only safe if the arithmetic is behind a call that the
// compiler cannot look into, since it may move arithmetic in the same function past the change. Otherwise use
// in_default_float_environment().
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : saved_(set_float_control(kDefaultFloatControl)) {}
  ~DefaultFloatEnvironment() { set_float_control(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

// Calls body() in the default environment.
template <class Body>
void in_default_float_environment(const Body& body) {
  void (*volatile call)(const Body&) = [](const Body& body) { body(); };  // volatile: so no arithmetic is moved out
  const DefaultFloatEnvironment environment;
  call(body);
}

}  // namespace adamops
