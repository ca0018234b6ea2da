// The norm of a piece of a grad: compiled once per SIMD target, as cpu_adam_kernel.cpp is, and with the same bits.
#include <cstring>

#include "cpu_adam_kernel.h"

#include ADAMOPS_SIMD_HEADER

#include "../simd/blocks.h"
#include "../simd/float_bits.h"
#include "grad_norm.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

static_assert(kBlock == kNormLanes, "a block has an element for each lane");

// Calls add(block) for the blocks of a chunk, in the order of grad_norm.h.
template <class T, class Add>
inline void for_each_block_of_chunk(const T* grad, int64_t count, const Add& add) {
  if (count < kNormChunk) return for_each_block(count, add, grad);
  for (int64_t turn = 0; turn < kNormChunk; turn += kBlock) add(grad + norm_turn(turn));
}

// A block as floats: where it lies, or in `room`.
inline const float* widened(const float* block, float*) {
  return block;
}
template <class T>
inline const float* widened(const T* block, float* room) {
  for (int64_t i = 0; i < kBlock; i += Pair::kElements) store_pair(room + i, load_pair(block + i));
  return room;
}

using Doubles = Ops::Doubles;
constexpr int64_t kDoubles = sizeof(Doubles) / sizeof(double);

// Sums are kept in as many lanes as a block has elements, each element in the lane of its place. In double the square
// of a float is exact, and 32768 of them in 32 lanes lose less than 2^-43 of their sum.
template <bool Squares, class T>
double sum_of(const T* grad, int64_t count) {
  Doubles sums[kBlock / kDoubles] = {};
  for_each_block_of_chunk(grad, count, [&](const T* block) {
    alignas(kCacheLine) float room[kBlock];
    const float* const floats = widened(block, room);
    for (int64_t i = 0; i < kBlock / kDoubles; ++i) {
      const Doubles x = Ops::load_doubles(floats + i * kDoubles);
      sums[i] += Squares ? x * x : x < 0.0 ? -x : x;
    }
  });
  double lanes[kBlock], total = 0.0;
  std::memcpy(lanes, sums, sizeof lanes);
  for (const double lane : lanes) total += lane;
  return total;
}

// Of the magnitudes as integers, so that NaN is the largest of all.
template <class T>
double largest_of(const T* grad, int64_t count) {
  int32_t largest[kBlock] = {};
  for_each_block_of_chunk(grad, count, [&](const T* block) {
    alignas(kCacheLine) float room[kBlock];
    const float* const x = widened(block, room);
    for (int64_t i = 0; i < kBlock; ++i) {
      const auto magnitude = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFF);
      largest[i] = magnitude > largest[i] ? magnitude : largest[i];
    }
  });
  int32_t most = 0;
  for (const int32_t lane : largest) most = lane > most ? lane : most;
  return double{float_of(static_cast<uint32_t>(most))};
}

template <class T>
double norm_of(const T* grad, Norm norm, int64_t count) {
  if (norm == kNormInf) return largest_of(grad, count);
  return norm == kNorm2 ? sum_of<true>(grad, count) : sum_of<false>(grad, count);
}

}  // namespace

double norm_range(const void* grad, Dtype dtype, Norm norm, int64_t count) {
  if (dtype == kFloat32) return norm_of(static_cast<const float*>(grad), norm, count);
  if (dtype == kBfloat16) return norm_of(static_cast<const bf16*>(grad), norm, count);
  return norm_of(static_cast<const fp16*>(grad), norm, count);
}

}  // namespace ADAMOPS_TARGET
}  // namespace adamops
