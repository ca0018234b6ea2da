// The arithmetic of cuda/blocks.cuh: a thread's elements as one number, and integers by way of floats. Device
// code only, which can also run on the host (tests/cuda_emulation).
#pragma once

#include "cuda/direct.cuh"
#include "formats/quantized_blocks.h"

namespace adamops {

constexpr int kWarp = 32, kElementsPerThread = kQuantizationBlock / kWarp;  // elements per thread

// CudaOps with integers, for formats/quantized_blocks.h and formats/split_masters.h. It converts between integers and
// floats by an addition, since conversion instructions take several times as long: a float just above 1.5 * 2^23 has an
// ulp of 1.
struct CudaBitOps : CudaOps {
  using Integers = int32_t;
  static constexpr float kWholes = 0x1.8p23f;
  static constexpr uint32_t kBitsOfWholes = 0x4B400000;
  static __device__ float add(float a, float b) { return __fadd_rn(a, b); }
  static __device__ int32_t bits(float a) { return static_cast<int32_t>(__float_as_uint(a)); }
  static __device__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
  // For positive numbers below 2^22.
  static __device__ int32_t truncated(float a) {
    return static_cast<int32_t>(__float_as_uint(__fadd_rd(a, kWholes)) - kBitsOfWholes);
  }
  static __device__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
};

// 1 / a and 1 / sqrt(a) within a few ulps.
#ifdef __CUDACC__
__device__ inline float estimate_of_inverse(float a) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(a));
  return estimate;
}
__device__ inline float estimate_of_inverse_root(float a) {
  float estimate;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(a));
  return estimate;
}
#else  // on the host, for tests
inline float estimate_of_inverse(float a) {
  return 1 / a;
}
inline float estimate_of_inverse_root(float a) {
  return 1 / __fsqrt_rn(a);
}
#endif

// The elements of a thread as one number, so that their roots and quotients overlap. One by one, each would check
// whether its operands are in range for its fast path, and the next would wait for the answer.
struct OwnFloats {
  float x[kElementsPerThread];

  __device__ float& operator[](int i) { return x[i]; }
  __device__ float operator[](int i) const { return x[i]; }
};
struct CudaOwnOps {
  using Number = OwnFloats;
  static __device__ Number set(float x) {
    return each([&](int) { return x; });
  }
  static __device__ Number mul(const Number& a, const Number& b) {
    return each([&](int i) { return __fmul_rn(a[i], b[i]); });
  }
  static __device__ Number fma(const Number& a, const Number& b, const Number& c) {
    return each([&](int i) { return __fmaf_rn(a[i], b[i], c[i]); });
  }
  static __device__ Number max(const Number& a, const Number& b) {
    return each([&](int i) { return CudaOps::max(a[i], b[i]); });
  }

  // The fast paths are those that nvcc takes for __fsqrt_rn() and __fdiv_rn() in these ranges: an estimate, refined by
  // Newton's method until it is correctly rounded (P. Markstein, "Computation of elementary functions on the IBM RISC
  // System/6000 processor", 1990).
  static __device__ Number sqrt(const Number& a) {
    bool fast = true;
    for_each([&](int i) { fast = fast && is_between(__float_as_uint(a[i]), 0x1p-101f, 0x1.fffffep127f); });
    if (!fast) return each([&](int i) { return __fsqrt_rn(a[i]); });
    return each([&](int i) {
      const float estimate = estimate_of_inverse_root(a[i]);
      const float root = __fmul_rn(a[i], estimate);
      return __fmaf_rn(__fmaf_rn(-root, root, a[i]), __fmul_rn(estimate, 0.5f), root);
    });
  }
  static __device__ Number div(const Number& a, const Number& b) {
    bool fast = true;
    for_each([&](int i) {
      fast = fast && is_between(__float_as_uint(a[i]) & 0x7FFFFFFFu, 0x1p-64f, 0x1p62f) &&
             is_between(__float_as_uint(b[i]), 0x1p-62f, 0x1p62f);
    });
    if (!fast) return each([&](int i) { return __fdiv_rn(a[i], b[i]); });
    return each([&](int i) {
      const float estimate = estimate_of_inverse(b[i]);
      const float inverse = __fmaf_rn(estimate, __fmaf_rn(-b[i], estimate, 1.0f), estimate);
      const float quotient = __fmul_rn(a[i], inverse);
      return __fmaf_rn(inverse, __fmaf_rn(-b[i], quotient, a[i]), quotient);
    });
  }

 private:
  template <class Visit>
  static __device__ void for_each(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kElementsPerThread; ++i) visit(i);
  }
  template <class Of>
  static __device__ Number each(const Of& of) {
    Number result;
    for_each([&](int i) { result[i] = of(i); });
    return result;
  }
  // Whether the float with these bits is between the bounds, which are positive.
  static __device__ bool is_between(uint32_t bits, float least, float most) {
    return bits - __float_as_uint(least) <= __float_as_uint(most) - __float_as_uint(least);
  }
};

}  // namespace adamops
