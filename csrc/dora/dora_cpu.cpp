// DoRA operators on the CPU: the adapted linear layer with an output scale, and the norm that the scale is made of.
//
//   n² = ‖W‖² + 2 rowsum(U ∘ sB) + rowsum(sB (A Aᵀ) ∘ sB),  U = W Aᵀ: one pass over W, W + sBA is never made.
#include <math.h>

#include <tuple>

#include "linear/cpu/adapted_linear.h"

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

// sum_q B[n, q] (A Aᵀ)[q, r]; A Aᵀ is symmetric.
float row_gram(const float* b, const float* products, int64_t rank, int64_t padded, int64_t r) {
  float sum = 0.0f;
  for (int64_t q = 0; q < rank; ++q) sum += b[q] * products[r * padded + q];
  return sum;
}

std::tuple<Tensor, Tensor> dora_weight_norm_cpu(Tensor weight, std::optional<Tensor> absmax,
                                                std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                                                std::optional<Tensor> nested_offset, int64_t blocksize,
                                                std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B,
                                                double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const int64_t n = held.out_features(), rank = lora_A.size(0);
  const RowFacts facts = weight_row_facts(kOp, held, lora_A, type);
  const Tensor products = gram(kOp, lora_A), b = wide_matrix(lora_B);
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
    for (int64_t i = begin; i < end; ++i) {
      float sum = 0.0f;
      const float* row = b_data + i * rank;
      for (int64_t r = 0; r < rank; ++r) {
        u_data[i * rank + r] = in[i * padded + r];
        sum += s * row[r] * (2.0f * in[i * padded + r] + s * row_gram(row, gram_data, rank, padded, r));
      }
      const float square = squares[i] + sum;
      out[i] = sqrtf(square < 0.0f ? 0.0f : square);
    }
  });
  return {norm, u};
}

std::tuple<Tensor, Tensor> dora_weight_norm_backward_cpu(Tensor grad, Tensor weight, std::optional<Tensor> absmax,
                                                         std::optional<Tensor> nested_absmax,
                                                         std::optional<Tensor> nested_code,
                                                         std::optional<Tensor> nested_offset, int64_t blocksize,
                                                         std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B,
                                                         Tensor norm, Tensor u, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const int64_t n = held.out_features(), k = held.in_features(), rank = lora_A.size(0);
  const Tensor products = gram(kOp, lora_A), a = wide_matrix(lora_A), b = wide_matrix(lora_B);
  const Tensor held_grad = float_vector(kOp, "grad", grad, n), held_norm = float_vector(kOp, "norm", norm, n);
  const Tensor held_u = wide_matrix(u);
  const int64_t padded = products.size(1);
  const float s = static_cast<float>(scaling);
  // cB, and dB
  Tensor left = empty({n, rank}, ScalarType::Float), grad_b = empty({n, rank}, ScalarType::Float);
  const float* b_data = b.const_data_ptr<float>();
  float* left_data = left.mutable_data_ptr<float>();
  parallel_for(0, n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float length = held_norm.const_data_ptr<float>()[i];
      const float c = length == 0.0f ? 0.0f : held_grad.const_data_ptr<float>()[i] / length;
      const float* row = b_data + i * rank;
      for (int64_t r = 0; r < rank; ++r) {
        left_data[i * rank + r] = c * row[r];
        const float product = s * row_gram(row, products.const_data_ptr<float>(), rank, padded, r);
        grad_b.mutable_data_ptr<float>()[i * rank + r] =
            c * s * (held_u.const_data_ptr<float>()[i * rank + r] + product);
      }
    }
  });
  // (cB)ᵀ B [R, R], then dA = s (cB)ᵀ W + s² (cB)ᵀ B A
  std::vector<float> inner(static_cast<size_t>(rank * rank), 0.0f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t q = 0; q < rank; ++q)
        inner[static_cast<size_t>(r * rank + q)] += left_data[i * rank + r] * b_data[i * rank + q];
  Tensor grad_a = weight_outer(kOp, held, left, type);
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

Adapter dora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B, const Tensor& out_scale, int64_t n,
                     double scaling, double dropout_p, const std::optional<Tensor>& seed, bool drop_base) {
  Adapter adapter;
  adapter.lora_A = lora_A;
  adapter.lora_B = lora_B;
  adapter.scaling = scaling;
  adapter.dropout = make_dropout(op, dropout_p, seed);
  adapter.drop_base = drop_base;
  adapter.out_scale = float_vector(op, "out_scale", out_scale, n);
  return adapter;
}

std::tuple<Tensor, Tensor, Tensor> dora_linear_cpu(
    Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
    std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor lora_A, Tensor lora_B, Tensor out_scale,
    double scaling, double dropout_p, std::optional<Tensor> seed, bool drop_base, bool want_z) {
  constexpr const char* kOp = "dora_linear";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const Adapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.out_features(), scaling, dropout_p, seed, drop_base);
  const AdaptedForward out = adapted_forward(kOp, x, held, bias, adapter, false, want_z);
  return {out.y, out.s, out.z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
    std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B, Tensor out_scale, Tensor s, Tensor z, bool z_is_scaled,
    double scaling, double dropout_p, std::optional<Tensor> seed, bool drop_base, bool needs_grad_x,
    bool needs_grad_scale) {
  constexpr const char* kOp = "dora_linear_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const Adapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.out_features(), scaling, dropout_p, seed, drop_base);
  const AdaptedBackward out = adapted_backward(kOp, grad, x, held, adapter, s, needs_grad_x);
  Tensor grad_scale = empty({0}, ScalarType::Float);
  if (needs_grad_scale) grad_scale = scale_gradient(kOp, grad, x, held, adapter, s, z, z_is_scaled, std::nullopt);
  return {out.grad_x, out.grad_A, out.grad_B, grad_scale};
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("dora_weight_norm", TORCH_BOX(&peft_ext::dora_weight_norm_cpu));
  m.impl("dora_weight_norm_backward", TORCH_BOX(&peft_ext::dora_weight_norm_backward_cpu));
  m.impl("dora_linear", TORCH_BOX(&peft_ext::dora_linear_cpu));
  m.impl("dora_linear_backward", TORCH_BOX(&peft_ext::dora_linear_backward_cpu));
}
