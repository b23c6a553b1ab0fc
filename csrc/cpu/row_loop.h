// Loops over a row in vectors of Vec (cpu/simd_<isa>.h); the last vector may have fewer lanes. Include this file after
// the target pragma (cpu/target_<isa>.h).
#pragma once

#include <stdint.h>

namespace peft_ext {
namespace {

// Loads and stores all lanes of a vector. WholeVec and PartVec are two types, so that a loop's body for whole vectors
// is compiled without masks.
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

// Loads and stores only the first `count` lanes of a vector. `load` sets the remaining lanes to 0. `only` sets the
// remaining lanes to 0, and `filled` sets the remaining lanes to the value of the first lane.
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

// Calls f(lanes, first column) for each vector of the columns [0, columns). `lanes` is a WholeVec, or for the
// columns that do not fill a vector, a PartVec.
template <typename F>
inline void for_vectors(int64_t columns, const F& f) {
  int64_t k = 0;
  for (; k + Vec::kWidth <= columns; k += Vec::kWidth) f(WholeVec(), k);
  if (k < columns) f(PartVec{columns - k}, k);
}

// Computes sums over [0, columns) in float32. f(lanes, first column, sums) adds the terms of `lanes` to `sums`, and 0
// in missing lanes. kTurns vectors of sums are used in turn, so that an addition need not wait for the previous
// addition. The order of the additions depends only on the number of columns and on Vec::kWidth.
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
