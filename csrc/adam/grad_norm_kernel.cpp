// The norm of a piece of a grad: compiled once per SIMD target, as cpu_adam_kernel.cpp is, and with the same bits.
#include "cpu_adam_kernel.h"

#include ADAMOPS_SIMD_HEADER

#include "../simd/blocks.h"
#include "../simd/float_bits.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

// Sums are kept in as many lanes as a block has elements, each element in the lane of its place. In double the square
// of a float is exact, and 32768 of them in 32 lanes lose less than 2^-43 of their sum.
struct Sums {
  double lanes[kBlock] = {};

  double total() const {
    double total = 0.0;
    for (const double lane : lanes) total += lane;
    return total;
  }
};

template <class T>
double sum_of(const T* grad, int64_t count, bool squares) {
  Sums sums;
  const auto add = [&](const T* from) {
    alignas(kCacheLine) float x[kBlock];
    for (int64_t i = 0; i < kBlock; i += Ops::kWidth) Ops::store(x + i, Ops::load(from + i));
    if (squares)
      for (int64_t i = 0; i < kBlock; ++i) sums.lanes[i] += double{x[i]} * double{x[i]};
    else
      for (int64_t i = 0; i < kBlock; ++i) sums.lanes[i] += double{x[i] < 0.0f ? -x[i] : x[i]};
  };
  for_each_block(count, 0, add, grad);
  return sums.total();
}

// Of the magnitudes as integers, so that NaN is the largest of all.
template <class T>
double largest_of(const T* grad, int64_t count) {
  int32_t largest[kBlock] = {};
  const auto compare = [&](const T* from) {
    alignas(kCacheLine) float x[kBlock];
    for (int64_t i = 0; i < kBlock; i += Ops::kWidth) Ops::store(x + i, Ops::load(from + i));
    for (int64_t i = 0; i < kBlock; ++i) {
      const auto magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFF);
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
  };
  for_each_block(count, 0, compare, grad);
  int32_t most = 0;
  for (const int32_t lane : largest) most = lane > most ? lane : most;
  return double{float_of(static_cast<uint32_t>(most))};
}

template <class T>
double norm_of(const T* grad, Norm norm, int64_t count) {
  return norm == kNormInf ? largest_of(grad, count) : sum_of(grad, count, norm == kNorm2);
}

}  // namespace

double norm_range(const void* grad, Dtype dtype, Norm norm, int64_t count) {
  if (dtype == kFloat32) return norm_of(static_cast<const float*>(grad), norm, count);
  if (dtype == kBfloat16) return norm_of(static_cast<const bf16*>(grad), norm, count);
  return norm_of(static_cast<const fp16*>(grad), norm, count);
}

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
