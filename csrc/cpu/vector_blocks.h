// How an element-wise kernel walks over memory: in vector blocks of kVectorBlock elements, or in pairs of vectors. The
// last one is padded, so that all elements run through the same code. Included by kernels, which are compiled once per
// SIMD target, after ADAMOPS_SIMD_HEADER. Must not know what is computed.
//
// Nothing here may have external linkage outside the target's namespace, standard library templates included: the
// linker would keep one copy for all targets, possibly one that only a newer CPU can run.
#pragma once

#include <cstdint>

#include "formats/half.h"

// The name of the target being compiled, as a string.
#define ADAMOPS_STRING(x) #x
#define ADAMOPS_EXPANDED_STRING(x) ADAMOPS_STRING(x)
#define ADAMOPS_TARGET_NAME ADAMOPS_EXPANDED_STRING(ADAMOPS_TARGET)

namespace adamops {
namespace ADAMOPS_TARGET {
namespace {

constexpr int64_t kCacheLine = 64;

// Elements of a vector block: one cache line of 16-bit values, two of fp32.
constexpr int64_t kVectorBlock = 32;

// Inlined however large, since vectors passed to a real call go through memory.
#define ADAMOPS_INLINE inline __attribute__((always_inline))

template <class T, class U>
constexpr bool same_type = false;
template <class T>
constexpr bool same_type<T, T> = true;

// Stands for a column that a kernel does not have.
struct NoColumn {
  NoColumn operator+(int64_t) const { return {}; }
};

// The address of the element at `index`.
template <class T>
inline T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}
template <class T>
inline const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}

// The same if the column exists, otherwise NoColumn.
template <bool Present, class T>
inline auto at_if(void* base, int64_t index) {
  if constexpr (Present)
    return at<T>(base, index);
  else
    return NoColumn{};
}

// Prefetches the cache lines of the kElements elements that are `bytes_ahead` further on, or nothing if that is 0. It
// is harmless past the end of a tensor.
template <int64_t kElements = kVectorBlock, class T>
inline void prefetch_block(const T* from, int64_t bytes_ahead) {
  if (!bytes_ahead) return;
  const char* line = reinterpret_cast<const char*>(from) + bytes_ahead;
  for (int64_t offset = 0; offset < kElements * int64_t{sizeof(T)}; offset += kCacheLine)
    __builtin_prefetch(line + offset);
}
template <int64_t>
inline void prefetch_block(NoColumn, int64_t) {}

// Two Numbers: elements in memory order, or the even elements and the odd ones. An element-wise rule does not care
// which element is in which lane, and even and odd bf16 values are a shift and a mask away from fp32, while widening
// them in order takes shuffles. (Not an array: GCC would keep it in memory where it is passed on.)
struct Pair {
  static constexpr int64_t kElements = 2 * Ops::kWidth;
  Ops::Number a, b;
};
static_assert(kVectorBlock % Pair::kElements == 0, "pairs fill blocks");

template <bool EvenOdd = false, class T>
inline Pair load_pair(const T* from) {
  if constexpr (EvenOdd) {
    return {Ops::load_even(from), Ops::load_odd(from)};
  } else if constexpr (same_type<T, bf16>) {
    Pair to;
    Ops::load_two(from, to.a, to.b);
    return to;
  } else {
    return {Ops::load(from), Ops::load(from + Ops::kWidth)};
  }
}
template <bool EvenOdd = false, class T>
inline void store_pair(T* to, const Pair& from) {
  if constexpr (EvenOdd) {
    Ops::store_even_odd(to, from.a, from.b);
  } else if constexpr (same_type<T, bf16>) {
    Ops::store_two(to, from.a, from.b);
  } else {
    Ops::store(to, from.a);
    Ops::store(to + Ops::kWidth, from.b);
  }
}

// A zero-padded copy of the tail, the elements that do not fill a vector block.
template <class T>
struct Padded {
  T values[kVectorBlock] = {};

  Padded(const T* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
  T* block() { return values; }
  void write_back(T* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
  }
};
// For a read-only column, nothing is written back.
template <class T>
struct Padded<const T> : Padded<T> {
  using Padded<T>::Padded;
  void write_back(const T*, int64_t) const {}
};
struct NoPadded {
  NoPadded(NoColumn, int64_t) {}
  NoColumn block() { return {}; }
  void write_back(NoColumn, int64_t) const {}
};

template <class T>
Padded<T> padding_of(T*);
inline NoPadded padding_of(NoColumn column) {
  return {column, 0};
}

template <class Update, class... Columns>
inline void update_tail(const Update& update, int64_t count, Columns... columns) {
  const auto run = [&](auto... padded) {
    update(padded.block()...);
    (padded.write_back(columns, count), ...);
  };
  run(decltype(padding_of(columns))(columns, count)...);
}

// Calls update(columns + i...) for vector blocks of kVectorBlock elements until `count` elements are done. The software
// prefetch distance is `prefetch_bytes`, 0 for none. A column is a T*, a const T* if it is read-only, or a NoColumn.
template <class Update, class... Columns>
inline void for_each_block(int64_t count, int prefetch_bytes, const Update& update, Columns... columns) {
  const int64_t tail = count % kVectorBlock, body = count - tail;
  for (int64_t i = 0; i < body; i += kVectorBlock) {
    (prefetch_block<kVectorBlock>(columns + i, prefetch_bytes), ...);
    update((columns + i)...);
  }
  if (tail) update_tail(update, tail, (columns + body)...);
}

// The same for an update that takes one Pair at a time in two phases: update.finish(update.start(columns + i...),
// columns + i...). Each Pair is started before the previous one is finished. Slow operations between the two phases
// then overlap, and few dependent instructions occupy the CPU's schedulers.
template <class Update, class... Columns>
inline void for_each_pair(int64_t count, int prefetch_bytes, const Update& update, Columns... columns) {
  constexpr int64_t kElements = Pair::kElements;
  const int64_t tail = count % kElements, body = count - tail;
  if (body) {
    auto started = update.start(columns...);
    for (int64_t i = kElements; i < body; i += kElements) {
      (prefetch_block<kElements>(columns + i, prefetch_bytes), ...);
      const auto next = update.start((columns + i)...);
      update.finish(started, (columns + (i - kElements))...);
      started = next;
    }
    update.finish(started, (columns + (body - kElements))...);
  }
  const auto whole = [&](auto... padded) { update.finish(update.start(padded...), padded...); };
  if (tail) update_tail(whole, tail, (columns + body)...);
}

}  // namespace
}  // namespace ADAMOPS_TARGET
}  // namespace adamops
