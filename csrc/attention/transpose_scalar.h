// Transposes a matrix of 32-bit words in plain C++. Include this file after the target pragma (cpu/target_<isa>.h), if
// the path has one.
#pragma once

#include <stdint.h>
#include <string.h>

namespace peft_ext {
namespace {

// Computes y[c * y_stride + r] = x[r, c] for 32-bit words. x_bytes: distance between rows of x in bytes. y_stride:
// distance between rows of y in words.
inline void transpose_words(const void* x, int64_t x_bytes, int64_t rows, int64_t columns, void* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      memcpy(static_cast<char*>(y) + 4 * (c * y_stride + r), static_cast<const char*>(x) + r * x_bytes + 4 * c, 4);
}

}  // namespace
}  // namespace peft_ext
