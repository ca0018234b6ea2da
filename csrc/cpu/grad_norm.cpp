// The norm of a piece of a grad: compiled once per SIMD target, like cpu/direct.cpp, and bit-identical on all
// targets. Must not know of threads or other pieces.
#include <cstring>

#include "cpu/kernels.h"

#include ADAMOPS_SIMD_HEADER

#include "cpu/vector_blocks.h"
#include "formats/float_bits.h"
#include "grad_norm.h"

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

static_assert(kVectorBlock == kNormLanes, "a block has an element for each lane");

// Calls add(block) for the vector blocks of a chunk, as floats, in the order of grad_norm.h.
template <class Add>
inline void for_each_block_of_chunk(const float* grad, int64_t count, const Add& add) {
  if (count < kNormChunk) return for_each_block(count, 0, add, grad);
  for (int64_t turn = 0; turn < kNormChunk; turn += kVectorBlock) add(grad + norm_index(turn));
}
// 16-bit values are widened several vector blocks ahead: loading what was just stored is slow if the pieces differ in
// size.
template <class T, class Add>
inline void for_each_block_of_chunk(const T* grad, int64_t count, const Add& add) {
  constexpr int64_t kAhead = 32 * kVectorBlock;
  alignas(kCacheLine) float scratch[kAhead];
  const auto widen = [](const T* block, float* to) {
    for (int64_t i = 0; i < kVectorBlock; i += Pair::kElements) store_pair(to + i, load_pair(block + i));
  };
  if (count < kNormChunk) {
    const auto widen_and_add = [&](const T* block) {
      widen(block, scratch);
      add(scratch);
    };
    return for_each_block(count, 0, widen_and_add, grad);
  }
  for (int64_t turn = 0; turn < kNormChunk; turn += kAhead) {
    for (int64_t i = 0; i < kAhead; i += kVectorBlock) widen(grad + norm_index(turn + i), scratch + i);
    for (int64_t i = 0; i < kAhead; i += kVectorBlock) add(scratch + i);
  }
}

using Doubles = Ops::Doubles;
constexpr int64_t kDoubles = sizeof(Doubles) / sizeof(double);

// Sums are kept in as many lanes as a vector block has elements, each element in the lane of its index. In double the
// square of a float is exact, and 32768 of them in 32 lanes lose less than 2^-43 of their sum.
template <bool Squares, class T>
double sum_of(const T* grad, int64_t count) {
  Doubles sums[kVectorBlock / kDoubles] = {};
  for_each_block_of_chunk(grad, count, [&](const float* block) {
    for (int64_t i = 0; i < kVectorBlock / kDoubles; ++i) {
      const Doubles x = Ops::load_doubles(block + i * kDoubles);
      sums[i] = Squares ? Ops::add_square(sums[i], x) : sums[i] + (x < 0.0 ? -x : x);
    }
  });
  double lanes[kVectorBlock], total = 0.0;
  std::memcpy(lanes, sums, sizeof lanes);
  for (const double lane : lanes) total += lane;
  return total;
}

// Compares magnitudes as integers, so that NaN is the largest of all.
template <class T>
double largest_of(const T* grad, int64_t count) {
  typedef int32_t Magnitudes __attribute__((vector_size(sizeof(Ops::Number))));
  Magnitudes largest[kVectorBlock / Ops::kWidth] = {};
  for_each_block_of_chunk(grad, count, [&](const float* block) {
    for (int64_t i = 0; i < kVectorBlock / Ops::kWidth; ++i) {
      Magnitudes x;
      std::memcpy(&x, block + i * Ops::kWidth, sizeof x);
      x &= 0x7FFFFFFF;
      largest[i] = x > largest[i] ? x : largest[i];
    }
  });
  int32_t lanes[kVectorBlock], most = 0;
  std::memcpy(lanes, largest, sizeof lanes);
  for (const int32_t lane : lanes) most = lane > most ? lane : most;
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
