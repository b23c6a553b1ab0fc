// The norms of W + s B A's rows and their gradients: see weight_norm.h.
#include "linear/cpu/weight_norm.h"

#include <math.h>

#include <vector>

#include "linear/cpu/passes.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

Tensor wide_matrix(const Tensor& matrix) { return as_contiguous(as_type(matrix, ScalarType::Float)); }

// A Aᵀ [R, padded].
Tensor gram(const char* op, const Tensor& lora_A) {
  FrozenWeight rows;
  rows.weight = lora_A;
  rows.shape = {lora_A.size(0), lora_A.size(1)};
  return weight_row_facts(op, rows, lora_A, lora_A.scalar_type()).product;
}

// out[r] = sum_q b[q] (A Aᵀ)[q, r] of a row of B, r < padded: sums side by side, which compilers make vectors of.
void row_gram(const float* b, const float* products, int64_t rank, int64_t padded, float* out) {
  for (int64_t r = 0; r < padded; ++r) out[r] = b[0] * products[r];
  for (int64_t q = 1; q < rank; ++q)
    for (int64_t r = 0; r < padded; ++r) out[r] += b[q] * products[q * padded + r];
}

}  // namespace

WeightNorm weight_norm(const char* op, const FrozenWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type) {
  const int64_t n = weight.out_features(), rank = lora_A.size(0);
  const RowFacts facts = weight_row_facts(op, weight, lora_A, type);
  const Tensor products = gram(op, lora_A), b = wide_matrix(lora_B);
  Tensor norm = empty({n}, ScalarType::Float), u = empty({n, rank}, ScalarType::Float);
  const int64_t padded = facts.product.size(1);
  const float* in = facts.product.const_data_ptr<float>();
  const float* squares = facts.squares.const_data_ptr<float>();
  const float* gram_data = products.const_data_ptr<float>();
  const float* b_data = b.const_data_ptr<float>();
  float* out = norm.mutable_data_ptr<float>();
  float* u_data = u.mutable_data_ptr<float>();
  const float s = static_cast<float>(scaling);
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> product(static_cast<size_t>(padded));
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.0f;
      const float* row = b_data + i * rank;
      row_gram(row, gram_data, rank, padded, product.data());
      for (int64_t r = 0; r < rank; ++r) {
        u_data[i * rank + r] = in[i * padded + r];
        sum += s * row[r] * (2.0f * in[i * padded + r] + s * product[static_cast<size_t>(r)]);
      }
      const float square = squares[i] + sum;
      out[i] = sqrtf(square < 0.0f ? 0.0f : square);
    }
  });
  return {norm, u};
}

WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const FrozenWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type) {
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = lora_A.size(0);
  const Tensor products = gram(op, lora_A), a = wide_matrix(lora_A), b = wide_matrix(lora_B);
  const Tensor held_grad = float_vector(op, "grad", grad, n), held_norm = float_vector(op, "norm", norm, n);
  const Tensor held_u = wide_matrix(u);
  const int64_t padded = products.size(1);
  const float s = static_cast<float>(scaling);
  // cB, and dB
  Tensor left = empty({n, rank}, ScalarType::Float), grad_b = empty({n, rank}, ScalarType::Float);
  const float* b_data = b.const_data_ptr<float>();
  float* left_data = left.mutable_data_ptr<float>();
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> product(static_cast<size_t>(padded));
    for (int64_t i = begin; i < end; ++i) {
      const float length = held_norm.const_data_ptr<float>()[i];
      const float c = length == 0.0f ? 0.0f : held_grad.const_data_ptr<float>()[i] / length;
      const float* row = b_data + i * rank;
      row_gram(row, products.const_data_ptr<float>(), rank, padded, product.data());
      for (int64_t r = 0; r < rank; ++r) {
        left_data[i * rank + r] = c * row[r];
        grad_b.mutable_data_ptr<float>()[i * rank + r] =
            c * s * (held_u.const_data_ptr<float>()[i * rank + r] + s * product[static_cast<size_t>(r)]);
      }
    }
  });
  // (cB)ᵀ B [R, R], then dA = s (cB)ᵀ W + s² (cB)ᵀ B A
  std::vector<float> inner(static_cast<size_t>(rank * rank), 0.0f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t q = 0; q < rank; ++q)
        inner[static_cast<size_t>(r * rank + q)] += left_data[i * rank + r] * b_data[i * rank + q];
  Tensor grad_a = weight_outer(op, weight, left, type);
  float* out = grad_a.mutable_data_ptr<float>();
  const float* a_data = a.const_data_ptr<float>();
  parallel_for(0, k, 256, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t i = begin; i < end; ++i) {
        float sum = 0.0f;
        for (int64_t q = 0; q < rank; ++q) sum += inner[static_cast<size_t>(r * rank + q)] * a_data[q * k + i];
        out[r * k + i] = s * out[r * k + i] + s * s * sum;
      }
  });
  return {as_type(grad_a, lora_A.scalar_type()), as_type(grad_b, lora_B.scalar_type())};
}

}  // namespace peft_ext
