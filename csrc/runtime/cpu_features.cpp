// Detects the features of the running CPU with CPUID and XGETBV (Intel SDM volume 2A, CPUID; volume 1, 13.3 and 14.3).
// Compiled for the architecture's baseline: it runs before anything is known about this CPU.
#include "runtime/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace adamops {

#if defined(__x86_64__)

namespace {

bool bit(uint32_t word, int index) {
  return (word >> index) & 1u;
}

// XCR0: which register files the operating system saves on a context switch. A CPU may have AVX while the kernel does
// not save its registers (an old kernel, or one booted with `noxsave`), and then the first AVX instruction is SIGILL.
uint64_t enabled_register_files() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

}  // namespace

uint32_t cpu_features() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return kNoFeatures;
  const bool os_uses_xsave = bit(ecx, 27), has_avx = bit(ecx, 28);
  if (!os_uses_xsave || !has_avx) return kNoFeatures;

  constexpr uint64_t kXmmYmm = 0x6, kOpmaskZmm = 0xE0;
  const uint64_t saved = enabled_register_files();
  if ((saved & kXmmYmm) != kXmmYmm) return kNoFeatures;

  uint32_t features = kNoFeatures;
  if (bit(ecx, 12)) features |= kFma;
  if (bit(ecx, 29)) features |= kF16c;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  if (bit(ebx, 5)) features |= kAvx2;
  if ((saved & kOpmaskZmm) == kOpmaskZmm) {
    if (bit(ebx, 16)) features |= kAvx512f;
    if (bit(ebx, 17)) features |= kAvx512dq;
    if (bit(ebx, 30)) features |= kAvx512bw;
    if (bit(ebx, 31)) features |= kAvx512vl;
  }
  return features;
}

int prefetch_distance_bytes() {
  uint32_t eax, ebx, ecx, edx;
  const bool is_intel = __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
  return is_intel ? 1024 : 0;
}

#else

uint32_t cpu_features() {
  return kNoFeatures;
}
int prefetch_distance_bytes() {
  return 256;
}

#endif

}  // namespace adamops
