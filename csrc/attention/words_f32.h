// Words of float32 operands: a word holds one value (see attention/kernels.h). Include this file after the target
// pragma (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include "cpu/row_loop.h"
#include "cpu/vec_math.h"

namespace peft_ext {
namespace {

using Element = float;
constexpr int64_t kWord = 1;  // number of float32 values in a 32-bit word

using WordVec = Vec;
inline WordVec load_words(const float* right) { return Vec::load(right); }
inline WordVec broadcast_word(const float* left) { return Vec::broadcast(*left); }
PEFT_EXT_INLINE Vec add_products(WordVec a, WordVec b, Vec sum) { return Vec::fma(a, b, sum); }

// Copies a row of float32 values to a row of a right operand, in whole vectors.
inline void join_rows(const float* row, const float*, int64_t columns, float* right) {
  for_vectors(columns, [&](auto lanes, int64_t i) { lanes.load(row + i).store(right + i); });
}

inline void store_left(Vec value, float* left) { value.store(left); }
inline void store_right(const Vec* values, float* right) { values[0].store(right); }

}  // namespace
}  // namespace peft_ext
