// Functions of a Vec (cpu/simd_<isa>.h), to a few ulp of float32. Included after the target pragma. A NaN stays one.
#pragma once

// A call for each vector would cost as much as what it computes.
#define PEFT_EXT_INLINE inline __attribute__((always_inline))

namespace peft_ext {
namespace {

// e^x, where x is held between -87.3 and 88.3: beside 1 what is left out is nothing.
PEFT_EXT_INLINE Vec vec_exp(Vec x) {
  x = Vec::min(Vec::broadcast(88.3f), Vec::max(Vec::broadcast(-87.3f), x));
  const Vec whole = Vec::mul(x, Vec::broadcast(1.44269504f)).round();
  // x - whole ln 2, ln 2 in two parts: products with the first are exact.
  Vec r = Vec::fma(whole, Vec::broadcast(-0.693359375f), x);
  r = Vec::fma(whole, Vec::broadcast(2.12194440e-4f), r);
  Vec p = Vec::broadcast(1.9875691500e-4f);
  constexpr float kRest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float c : kRest) p = Vec::fma(p, r, Vec::broadcast(c));
  p = Vec::add(Vec::fma(p, Vec::mul(r, r), r), Vec::broadcast(1.0f));
  return Vec::mul(p, whole.exp2());
}

// 1 / (1 + e^-x)
PEFT_EXT_INLINE Vec vec_sigmoid(Vec x) {
  const Vec one = Vec::broadcast(1.0f);
  return Vec::div(one, Vec::add(one, vec_exp(Vec::sub(Vec::zero(), x))));
}

// The normal distribution, 0.5 (1 + erf(x / √2)) = 0.5 erfc(-x / √2): with z = |x| / √2 and t = 1 / (1 + z / 2)
// erfc(z) = t e^(-z² + P(t)), to 1.2e-7 of itself for every z (Press et al., Numerical Recipes, erfcc).
PEFT_EXT_INLINE Vec vec_normal(Vec x) {
  const Vec z = Vec::mul(x.abs(), Vec::broadcast(0.70710678f)), one = Vec::broadcast(1.0f);
  const Vec t = Vec::div(one, Vec::fma(z, Vec::broadcast(0.5f), one));
  Vec p = Vec::broadcast(0.17087277f);
  constexpr float kRest[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                             0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  for (const float c : kRest) p = Vec::fma(p, t, Vec::broadcast(c));
  const Vec tail = Vec::mul(Vec::mul(t, Vec::broadcast(0.5f)), vec_exp(Vec::sub(p, Vec::mul(z, z))));
  return Vec::positive(x, Vec::sub(one, tail), tail);
}

}  // namespace
}  // namespace peft_ext
