// The product of a left and a right operand (see attention/kernels.h) with vector instructions. In this file, a left
// operand is a row-major matrix. Include this file after the target pragma (cpu/target_<isa>.h) and the headers that
// define Vec and the operands' words. product_amx.h defines the same names for AMX.
#pragma once

#include <utility>

#include "attention/kernels.h"

namespace peft_ext {
namespace {

// A product is computed in strips of its result: the sums of a strip, kRows rows by kVecs vectors, stay in registers.
constexpr int kRows = 6;
constexpr int kVecs = Vec::kWidth == 8 ? 2 : 4;
constexpr int64_t kWidth = Vec::kWidth;
constexpr int64_t kLeftRows = 1;   // rows of left operands are padded to a multiple of kLeftRows
constexpr int64_t kDepth = kWord;  // the depth of operands is padded with zeros to a multiple of kDepth
constexpr bool kInPlace = true;    // whether a product can read rows of k and v in place

struct ProductUnit {};  // exists while a thread computes a unit of work; empty, because only AMX needs a setup

// Computes one strip of a product: c = left right, or c += left right if `add`. c is [kM, kV vectors], left is
// [kM, steps words], right is [steps, kV vectors of words].
template <int kM, int kV>
void multiply_strip(const Element* left, int64_t left_stride, const Element* right, int64_t right_stride, int64_t steps,
                    float* c, int64_t c_stride, bool add) {
  Vec sums[kM][kV];
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kV; ++v) sums[m][v] = add ? Vec::load(c + m * c_stride + v * kWidth) : Vec::zero();
  for (int64_t s = 0; s < steps; ++s) {
    WordVec lanes[kV];
    for (int v = 0; v < kV; ++v) lanes[v] = load_words(right + v * kWidth * kWord);
    for (int m = 0; m < kM; ++m) {
      const WordVec row = broadcast_word(left + m * left_stride);
      for (int v = 0; v < kV; ++v) sums[m][v] = add_products(row, lanes[v], sums[m][v]);
    }
    left += kWord;
    right += right_stride;
  }
  for (int m = 0; m < kM; ++m)
    for (int v = 0; v < kV; ++v) sums[m][v].store(c + m * c_stride + v * kWidth);
}

using Strip = void (*)(const Element*, int64_t, const Element*, int64_t, int64_t, float*, int64_t, bool);

template <int... kAt>
inline Strip strip_at(int at, std::integer_sequence<int, kAt...>) {
  static constexpr Strip kStrips[] = {multiply_strip<kAt / kVecs + 1, kAt % kVecs + 1>...};
  return kStrips[at];
}

// Computes c [rows, vecs vectors] = left right, or c += left right if `add`. Strides are in elements.
inline void multiply(int64_t rows, int64_t vecs, const Element* left, int64_t left_stride, const Element* right,
                     int64_t right_stride, int64_t steps, float* c, int64_t c_stride, bool add) {
  for (int64_t v = 0; v < vecs; v += kVecs)
    for (int64_t r = 0; r < rows; r += kRows) {
      const int m = static_cast<int>(min_i64(kRows, rows - r)), n = static_cast<int>(min_i64(kVecs, vecs - v));
      strip_at((m - 1) * kVecs + n - 1, std::make_integer_sequence<int, kRows * kVecs>())(
          left + r * left_stride, left_stride, right + v * kWidth * kWord, right_stride, steps,
          c + r * c_stride + v * kWidth, c_stride, add);
    }
}

}  // namespace
}  // namespace peft_ext
