// Mathematical functions of a Vec (cpu/simd_<isa>.h), accurate to a few ulp of float32 unless a comment states another
// error. The functions return NaN for NaN. Include this file after the target pragma (cpu/target_<isa>.h) and Vec
// (cpu/simd_<isa>.h).
#pragma once

// The functions must be inlined: a call per vector would cost as much as the computation.
#define PEFT_EXT_INLINE inline __attribute__((always_inline))

namespace peft_ext {
namespace {

// Returns e^x with x clamped to [-87.3, 87.3]. At x = -87.3, 1 + e^x is already 1; at x = 87.3, 1 / (1 + e^x) is still
// a normal number.
PEFT_EXT_INLINE Vec vec_exp(Vec x) {
  x = Vec::min(Vec::broadcast(87.3f), Vec::max(Vec::broadcast(-87.3f), x));
  const Vec whole = Vec::mul(x, Vec::broadcast(1.44269504f)).round();
  // Computes r = x - whole ln 2, with ln 2 as a sum of two constants: the product of `whole` and the first constant is
  // exact.
  Vec r = Vec::fma(whole, Vec::broadcast(-0.693359375f), x);
  r = Vec::fma(whole, Vec::broadcast(2.12194440e-4f), r);
  Vec p = Vec::broadcast(1.9875691500e-4f);
  constexpr float kRest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (const float c : kRest) p = Vec::fma(p, r, Vec::broadcast(c));
  p = Vec::add(Vec::fma(p, Vec::mul(r, r), r), Vec::broadcast(1.0f));
  return Vec::times_exp2(p, whole);
}

// Returns 2^x for x up to 127. For x below -126 the result is 2^-126.
PEFT_EXT_INLINE Vec vec_exp2(Vec x) {
  x = Vec::max(Vec::broadcast(-126.0f), x);
  const Vec whole = x.round(), r = Vec::sub(x, whole);
  // The polynomial p approximates 2^r with a relative error below 5e-9, and is exactly 1 at r = 0.
  Vec p = Vec::broadcast(1.5461447463e-4f);
  constexpr float kRest[] = {1.3390867351e-3f, 9.6180566699e-3f, 5.5503571043e-2f,
                             2.4022650922e-1f, 6.9314718803e-1f, 1.0f};
  for (const float c : kRest) p = Vec::fma(p, r, Vec::broadcast(c));
  return Vec::times_exp2(p, whole);
}

// Returns 1 / (1 + e^-x).
PEFT_EXT_INLINE Vec vec_sigmoid(Vec x) {
  const Vec one = Vec::broadcast(1.0f);
  return Vec::add(one, vec_exp(Vec::sub(Vec::zero(), x))).reciprocal();
}

// Returns tanh x = 1 - 2 / (e^2x + 1), with an absolute error below 2^-23.
PEFT_EXT_INLINE Vec vec_tanh(Vec x) {
  const Vec one = Vec::broadcast(1.0f), two = Vec::broadcast(2.0f);
  return Vec::sub(one, Vec::mul(two, Vec::add(vec_exp(Vec::add(x, x)), one).reciprocal()));
}

struct Normal {
  Vec below, bell;
};

// Returns the normal distribution function, 0.5 (1 + erf(x / √2)), as `below`, and e^(-x²/2) as `bell`. With
// z = |x| / √2 and t = 1 / (1 + 0.3 z), erfc(z) is t P(t) e^(-z²), where P is a polynomial of degree 8 that was fitted
// for z up to 9.5, with a relative error of 2e-8.
PEFT_EXT_INLINE Normal vec_normal(Vec x) {
  const Vec one = Vec::broadcast(1.0f), far = Vec::min(Vec::broadcast(64.0f), x.abs());
  const Vec t = Vec::fma(far, Vec::broadcast(0.21213203f), one).reciprocal();
  Vec p = Vec::broadcast(-0.129434071f);
  constexpr float kRest[] = {0.485096405f, -0.511226345f, 0.54639493f,  -0.0936311702f,
                             0.214436246f, 0.148482438f,  0.170691934f, 0.169189615f};
  for (const float c : kRest) p = Vec::fma(p, t, Vec::broadcast(c));
  const Vec bell = vec_exp(Vec::mul(Vec::mul(far, far), Vec::broadcast(-0.5f)));
  const Vec tail = Vec::mul(Vec::mul(Vec::mul(t, Vec::broadcast(0.5f)), p), bell);
  return {Vec::positive(x, Vec::sub(one, tail), tail), bell};
}

}  // namespace
}  // namespace peft_ext
