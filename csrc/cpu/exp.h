// e^x and tanh x of a vector in float32, by one algorithm on every CPU path. Included after the path's Vec
// (cpu/simd_<isa>.h).
#pragma once

namespace peft_ext {
namespace {

// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2, where a polynomial is within 1 ulp: the series of e^r to
// r^7, whose rest is below 2^-26. Below -87.33 it is 0 (no subnormals), from 88.38 on the value there; of NaN, NaN.
inline Vec exp(Vec x) {
  const Vec lowest = Vec::broadcast(-87.33f), highest = Vec::broadcast(88.37f);
  // max takes its second argument where one is NaN; min(x, h) = -max(-h, -x).
  const Vec at =
      Vec::sub(Vec::zero(), Vec::max(Vec::sub(Vec::zero(), highest), Vec::sub(Vec::zero(), Vec::max(lowest, x))));
  const Vec n = Vec::mul(at, Vec::broadcast(1.44269504088896341f)).round();
  // ln 2 in two terms, the first of so few bits that n times it is exact.
  Vec r = Vec::fma(n, Vec::broadcast(-0.693359375f), at);
  r = Vec::fma(n, Vec::broadcast(2.12194440e-4f), r);
  Vec sum = Vec::fma(r, Vec::broadcast(1.0f / 5040.0f), Vec::broadcast(1.0f / 720.0f));
  sum = Vec::fma(sum, r, Vec::broadcast(1.0f / 120.0f));
  sum = Vec::fma(sum, r, Vec::broadcast(1.0f / 24.0f));
  sum = Vec::fma(sum, r, Vec::broadcast(1.0f / 6.0f));
  sum = Vec::fma(sum, r, Vec::broadcast(0.5f));
  sum = Vec::fma(sum, r, Vec::broadcast(1.0f));
  sum = Vec::fma(sum, r, Vec::broadcast(1.0f));
  return Vec::positive(Vec::sub(lowest, x), Vec::zero(), Vec::mul(sum, n.exp2()));
}

// 1 - 2 / (e^2x + 1): within 2^-23 of tanh x, absolutely; of NaN, NaN.
inline Vec tanh(Vec x) {
  const Vec one = Vec::broadcast(1.0f);
  return Vec::sub(one, Vec::div(Vec::broadcast(2.0f), Vec::add(exp(Vec::add(x, x)), one)));
}

}  // namespace
}  // namespace peft_ext
