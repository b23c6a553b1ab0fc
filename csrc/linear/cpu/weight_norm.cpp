// Computes the norm of each row of W + s B A, and the gradients of A and B through the norm. The formulas are in
// weight_norm.h.
#include "cpu/threads.h"
#include "linear/cpu/weight_norm.h"

#include <math.h>
#include <string.h>

#include <vector>

#include "linear/cpu/passes.h"

namespace peft_ext {
namespace {

Tensor wide_matrix(const Tensor& matrix) { return as_contiguous(as_type(matrix, ScalarType::Float)); }

// Returns the matrix A Aᵀ [R, R].
Tensor gram(const char* op, const Tensor& lora_A) {
  FrozenWeight rows;
  rows.weight = lora_A;
  rows.shape = {lora_A.size(0), lora_A.size(1)};
  return weight_row_facts(op, rows, lora_A, lora_A.scalar_type()).product;
}

// Returns B A Aᵀ [N, R], which one pass over B computes from products = A Aᵀ.
Tensor times_gram(const char* op, const Tensor& b, const Tensor& products) {
  const int64_t rank = b.size(1), padded = products.size(1);
  const Tensor square = empty({rank, rank}, ScalarType::Float);
  for (int64_t r = 0; r < rank; ++r)
    memcpy(square.mutable_data_ptr<float>() + r * rank, products.const_data_ptr<float>() + r * padded,
           static_cast<size_t>(rank) * sizeof(float));
  FrozenWeight rows;
  rows.weight = b;
  rows.shape = {b.size(0), rank};
  return weight_row_facts(op, rows, square, ScalarType::Float).product;
}

// Returns sum_r s b[r] (2 u[r] + s t[r]) for a row b of B, a row u of U and a row t of B A Aᵀ. norm_term keeps eight
// parallel sums, so that compilers vectorize the loop.
float norm_term(const float* b, const float* u, const float* t, float s, int64_t rank) {
  constexpr int64_t kSide = 8;
  float sums[kSide] = {};
  int64_t r = 0;
  for (; r + kSide <= rank; r += kSide)
    for (int64_t i = 0; i < kSide; ++i) sums[i] += b[r + i] * (2.0f * u[r + i] + s * t[r + i]);
  float sum = 0.0f;
  for (; r < rank; ++r) sum += b[r] * (2.0f * u[r] + s * t[r]);
  for (const float side : sums) sum += side;
  return s * sum;
}

void check_factors(const char* op, const FrozenWeight& weight, const Tensor& lora_A, const Tensor& lora_B) {
  const int64_t n = weight.out_features(), k = weight.in_features();
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == k && lora_A.size(0) > 0, op, ": lora_A has ", lora_A.numel(),
                  " elements, wanted [R, ", k, "] of a rank of 1 or more");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) == lora_A.size(0), op, ": lora_B is not [",
                  n, ", ", lora_A.size(0), "]");
}

}  // namespace

WeightNorm weight_norm(const char* op, const FrozenWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type) {
  check_factors(op, weight, lora_A, lora_B);
  const int64_t n = weight.out_features(), rank = lora_A.size(0);
  const RowFacts facts = weight_row_facts(op, weight, lora_A, type);
  const Tensor b = wide_matrix(lora_B), products = times_gram(op, b, gram(op, lora_A));
  Tensor norm = empty({n}, ScalarType::Float), u = empty({n, rank}, ScalarType::Float);
  const int64_t padded = facts.product.size(1);
  const float* in = facts.product.const_data_ptr<float>();
  const float* squares = facts.squares.const_data_ptr<float>();
  const float* of_gram = products.const_data_ptr<float>();
  const float* b_data = b.const_data_ptr<float>();
  float* out = norm.mutable_data_ptr<float>();
  float* u_data = u.mutable_data_ptr<float>();
  const float s = static_cast<float>(scaling);
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      memcpy(u_data + i * rank, in + i * padded, static_cast<size_t>(rank) * sizeof(float));
      const float square = squares[i] + norm_term(b_data + i * rank, in + i * padded, of_gram + i * padded, s, rank);
      out[i] = sqrtf(square < 0.0f ? 0.0f : square);
    }
  });
  return {norm, u};
}

WeightNormGradient weight_norm_backward(const char* op, const Tensor& grad, const FrozenWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type) {
  check_factors(op, weight, lora_A, lora_B);
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = lora_A.size(0);
  STD_TORCH_CHECK(u.numel() == n * rank, op, ": u has ", u.numel(), " elements, wanted [", n, ", ", rank, "]");
  const Tensor a = wide_matrix(lora_A), b = wide_matrix(lora_B), products = times_gram(op, b, gram(op, lora_A));
  const Tensor held_grad = float_vector(op, "grad", grad, n), held_norm = float_vector(op, "norm", norm, n);
  const Tensor held_u = wide_matrix(u);
  const int64_t padded = products.size(1);
  const float s = static_cast<float>(scaling);
  // Computes dB and c B, where c is the norm's gradient divided by the norm, or 0 where the norm is 0.
  Tensor left = empty({n, rank}, ScalarType::Float), grad_b = empty({n, rank}, ScalarType::Float);
  const float* b_data = b.const_data_ptr<float>();
  float* left_data = left.mutable_data_ptr<float>();
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float length = held_norm.const_data_ptr<float>()[i];
      const float c = length == 0.0f ? 0.0f : held_grad.const_data_ptr<float>()[i] / length;
      const float* row = b_data + i * rank;
      const float* of_gram = products.const_data_ptr<float>() + i * padded;
      for (int64_t r = 0; r < rank; ++r) {
        left_data[i * rank + r] = c * row[r];
        grad_b.mutable_data_ptr<float>()[i * rank + r] =
            c * s * (held_u.const_data_ptr<float>()[i * rank + r] + s * of_gram[r]);
      }
    }
  });
  // Computes (c B)ᵀ B [R, R], then dA = s (c B)ᵀ W + s² (c B)ᵀ B A.
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
