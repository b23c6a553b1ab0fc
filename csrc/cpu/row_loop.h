// A row in vectors of Vec (cpu/simd_<isa>.h), the last one of fewer lanes. Included after the target pragma.
#pragma once

#include <stdint.h>

namespace peft_ext {
namespace {

// All lanes, as a type of its own: a loop's body is compiled without masks.
struct WholeVec {
  template <typename T>
  Vec load(const T* x) const {
    return Vec::load_as(x);
  }
  template <typename T>
  void store(T* x, Vec value) const {
    value.store_as(x);
  }
  Vec only(Vec value) const { return value; }
  Vec filled(Vec value) const { return value; }
};

// The first `count` lanes: the others load as 0 and are not stored; `only` makes them 0, `filled` the first one again.
struct PartVec {
  int64_t count;
  template <typename T>
  Vec load(const T* x) const {
    return Vec::load_as(x, count);
  }
  template <typename T>
  void store(T* x, Vec value) const {
    value.store_as(x, count);
  }
  Vec only(Vec value) const { return value.first(count); }
  Vec filled(Vec value) const {
    float lanes[Vec::kWidth];
    value.store(lanes);
    for (int64_t i = count; i < Vec::kWidth; ++i) lanes[i] = lanes[0];
    return Vec::load(lanes);
  }
};

// f(WholeVec or PartVec, first column) over [0, columns).
template <typename F>
inline void for_vectors(int64_t columns, const F& f) {
  int64_t k = 0;
  for (; k + Vec::kWidth <= columns; k += Vec::kWidth) f(WholeVec(), k);
  if (k < columns) f(PartVec{columns - k}, k);
}

// Sums over [0, columns) in float32; f(lanes, first column, sums) adds the terms of its lanes, 0 for those that are not
// there. kTurns vectors are added to in turn, which do not wait for each other, and in the end their lanes: the order
// depends on the columns and on Vec alone.
template <int kSums, typename F>
inline void sum_vectors(int64_t columns, float (&total)[kSums], const F& f) {
  constexpr int kTurns = 4;
  Vec sums[kTurns][kSums];
  for (int turn = 0; turn < kTurns; ++turn)
    for (int s = 0; s < kSums; ++s) sums[turn][s] = Vec::zero();
  int64_t k = 0;
  for (; k + kTurns * Vec::kWidth <= columns; k += kTurns * Vec::kWidth)
    for (int turn = 0; turn < kTurns; ++turn) f(WholeVec(), k + turn * Vec::kWidth, sums[turn]);
  for (; k + Vec::kWidth <= columns; k += Vec::kWidth) f(WholeVec(), k, sums[0]);
  if (k < columns) f(PartVec{columns - k}, k, sums[1]);
  for (int s = 0; s < kSums; ++s)
    total[s] = Vec::add(Vec::add(sums[0][s], sums[1][s]), Vec::add(sums[2][s], sums[3][s])).sum();
}

}  // namespace
}  // namespace peft_ext
