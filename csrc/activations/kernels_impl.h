// The activation kernels of activations/kernels.h for one instruction set. Include this file after the target pragma
// (cpu/target_<isa>.h) and Vec (cpu/simd_<isa>.h).
#pragma once

#include <type_traits>

#include "activations/kernels.h"
#include "cpu/row_loop.h"
#include "cpu/vec_math.h"

namespace peft_ext {
namespace {

struct Activated {
  Vec value, slope;  // act(u) and act'(u); the compiler removes the computation of the one that is not used
};

template <Activation kActivation>
PEFT_EXT_INLINE Activated activated(Vec u) {
  const Vec one = Vec::broadcast(1.0f);
  if constexpr (kActivation == Activation::kGelu) {
    const Normal gate = vec_normal(u);
    return {Vec::mul(u, gate.below), Vec::fma(Vec::mul(u, Vec::broadcast(0.39894228f)), gate.bell, gate.below)};
  }
  if constexpr (kActivation == Activation::kGeluTanh) {
    // 0.5 (1 + tanh z) = 1 / (1 + e^-2z),  2z = 2 √(2/π) (u + 0.044715 u³)
    const Vec square = Vec::mul(u, u);
    const Vec cubic = Vec::fma(square, Vec::broadcast(0.071354816f), Vec::broadcast(1.5957691f));
    const Vec gate = vec_sigmoid(Vec::mul(u, cubic));
    const Vec inner = Vec::fma(square, Vec::broadcast(0.21406445f), Vec::broadcast(1.5957691f));
    const Vec value = Vec::mul(u, gate);
    return {value, Vec::fma(Vec::mul(value, Vec::sub(one, gate)), inner, gate)};
  }
  if constexpr (kActivation == Activation::kSilu) {
    const Vec gate = vec_sigmoid(u), value = Vec::mul(u, gate);
    return {value, Vec::fma(value, Vec::sub(one, gate), gate)};
  }
  const Vec above = Vec::max(Vec::zero(), u);
  if constexpr (kActivation == Activation::kRelu2) return {Vec::mul(above, above), Vec::add(above, above)};
  return {above, Vec::positive(u, one, Vec::zero())};
}

template <typename T>
const T* row_of(const StridedRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <typename T>
T* row_of(const WrittenRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

template <Activation kActivation, typename T>
void gated_range(const GatedRows& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = row_of<T>(work.gate, row), *up = work.up.data == nullptr ? nullptr : row_of<T>(work.up, row);
    T* out = row_of<T>(work.out, row);
    for_vectors(work.columns, [&](auto lanes, int64_t k) {
      const Vec value = activated<kActivation>(lanes.load(gate + k)).value;
      lanes.store(out + k, up == nullptr ? value : Vec::mul(value, lanes.load(up + k)));
    });
  }
}

template <Activation kActivation, typename T>
void gated_gradient_range(const GatedRows& work, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *gate = row_of<T>(work.gate, row), *grad = row_of<T>(work.grad, row);
    T* out = row_of<T>(work.out, row);
    if (work.up.data == nullptr) {
      for_vectors(work.columns, [&](auto lanes, int64_t k) {
        lanes.store(out + k, Vec::mul(lanes.load(grad + k), activated<kActivation>(lanes.load(gate + k)).slope));
      });
      continue;
    }
    const T* up = row_of<T>(work.up, row);
    T* out_up = row_of<T>(work.out_up, row);
    for_vectors(work.columns, [&](auto lanes, int64_t k) {
      const Activated h = activated<kActivation>(lanes.load(gate + k));
      const Vec dy = lanes.load(grad + k);
      lanes.store(out + k, Vec::mul(Vec::mul(dy, lanes.load(up + k)), h.slope));
      lanes.store(out_up + k, Vec::mul(dy, h.value));
    });
  }
}

// Calls f with an integral constant, whose ::value is the activation.
template <typename F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kRelu2:
      return f(std::integral_constant<Activation, Activation::kRelu2>());
  }
}

void gated_rows(const GatedRows& work, int64_t begin, int64_t end) {
  with_activation(work.activation, [&](auto activation) {
    with_dtype(work.dtype,
               [&](auto zero) { gated_range<decltype(activation)::value, decltype(zero)>(work, begin, end); });
  });
}

void gated_gradient(const GatedRows& work, int64_t begin, int64_t end) {
  with_activation(work.activation, [&](auto activation) {
    with_dtype(work.dtype,
               [&](auto zero) { gated_gradient_range<decltype(activation)::value, decltype(zero)>(work, begin, end); });
  });
}

}  // namespace
}  // namespace peft_ext
