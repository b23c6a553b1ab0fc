// The rotary kernel of rotary/kernels.h for one instruction set. Include this file after the target pragma
// (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include "cpu/row_loop.h"
#include "rotary/kernels.h"

namespace peft_ext {
namespace {

template <bool kBack, typename T>
void rotate_head(const T* x, T* y, const T* cos, const T* sin, int64_t half) {
  for_vectors(half, [&](auto lanes, int64_t i) {
    const Vec x1 = lanes.load(x + i), x2 = lanes.load(x + half + i);
    const Vec c1 = lanes.load(cos + i), c2 = lanes.load(cos + half + i);
    const Vec s1 = lanes.load(sin + i), s2 = lanes.load(sin + half + i);
    const Vec first = Vec::mul(x1, c1), second = Vec::mul(x2, c2);
    if (kBack) {
      lanes.store(y + i, Vec::fma(x2, s2, first));
      lanes.store(y + half + i, Vec::sub(second, Vec::mul(x1, s1)));
    } else {
      lanes.store(y + i, Vec::sub(first, Vec::mul(x2, s1)));
      lanes.store(y + half + i, Vec::fma(x1, s2, second));
    }
  });
}

template <bool kBack, typename T>
void rotate_range(const Rotary& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t batch = row / work.tokens, token = row % work.tokens;
    const int64_t at = batch * work.cos_batch + token * work.size;
    const T *cos = static_cast<const T*>(work.cos) + at, *sin = static_cast<const T*>(work.sin) + at;
    for (const Heads& part : work.parts) {
      const T* x = static_cast<const T*>(part.x) + batch * part.x_batch + token * part.x_token;
      T* y = static_cast<T*>(part.y) + batch * part.y_batch + token * part.y_token;
      for (int64_t head = 0; head < part.heads; ++head)
        rotate_head<kBack>(x + head * part.x_head, y + head * part.y_head, cos, sin, work.size / 2);
    }
  }
}

void rotate(const Rotary& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto zero) {
    using T = decltype(zero);
    work.back ? rotate_range<true, T>(work, begin, end) : rotate_range<false, T>(work, begin, end);
  });
}

}  // namespace
}  // namespace peft_ext
