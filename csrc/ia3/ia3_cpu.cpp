// IA3 operators on the CPU: the linear layer with its input or its output scaled, and the scale alone.
//
//   output:       Y = l ∘ (x Wᵀ + b)    dX = (l ∘ dY) W    dl = sum_t dY ∘ (Y / l)
//   feedforward:  Y = (l ∘ x) Wᵀ + b    dX = l ∘ U         dl = sum_t x ∘ U,  U = dY W
#include <math.h>

#include <tuple>

#include "linear/adapted_linear.h"

namespace peft_ext {
namespace {

// Where |l| is smaller, Y = l Z holds too little of Z to divide it back.
constexpr float kSmallestScale = 1.0f / 64.0f;

Adapter ia3_adapter(const char* op, const Tensor& ia3_l, const FrozenWeight& weight, bool feedforward) {
  Adapter adapter;
  const int64_t size = feedforward ? weight.in_features() : weight.out_features();
  (feedforward ? adapter.in_scale : adapter.out_scale) = float_vector(op, "ia3_l", ia3_l, size);
  return adapter;
}

Tensor ia3_linear_cpu(Tensor x, Tensor weight, std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                      std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor ia3_l, bool feedforward) {
  constexpr const char* kOp = "ia3_linear";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  return adapted_forward(kOp, x, held, bias, ia3_adapter(kOp, ia3_l, held, feedforward), true, false).y;
}

// dl [N] of the output scale.
Tensor output_gradient(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                       const std::optional<Tensor>& bias, const Tensor& scale, const Tensor& y) {
  const int64_t n = weight.out_features(), tokens = rows_of(x);
  Tensor out = empty({n}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  const Tensor flat_grad = torch::stable::view(torch::stable::contiguous(grad), {tokens, n});
  const Tensor sums = column_pass(op, flat_grad, nullptr, 0.0f, &y).sums;
  const float* l = scale.const_data_ptr<float>();
  std::vector<int64_t> small;
  for (int64_t i = 0; i < n; ++i) {
    if (!(fabsf(l[i]) >= kSmallestScale)) small.push_back(i);
    to[i] = sums.const_data_ptr<float>()[i] / l[i];
  }
  if (small.empty()) return out;
  const std::vector<float> products = row_products(op, grad, x, weight, small);
  for (size_t i = 0; i < small.size(); ++i) to[small[i]] = products[i];
  if (!bias.has_value()) return out;
  const Tensor wide_bias = float_vector(op, "bias", *bias, n);
  const Tensor wide_grad = torch::stable::contiguous(torch::stable::to(flat_grad, ScalarType::Float));
  for (const int64_t i : small) {
    double sum = 0.0;
    for (int64_t t = 0; t < tokens; ++t) sum += wide_grad.const_data_ptr<float>()[t * n + i];
    to[i] += static_cast<float>(sum) * wide_bias.const_data_ptr<float>()[i];
  }
  return out;
}

std::tuple<Tensor, Tensor> ia3_linear_backward_cpu(Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> absmax,
                                                   std::optional<Tensor> nested_absmax,
                                                   std::optional<Tensor> nested_code,
                                                   std::optional<Tensor> nested_offset, int64_t blocksize,
                                                   std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor ia3_l,
                                                   std::optional<Tensor> y, bool feedforward, bool needs_grad_x,
                                                   bool needs_grad_l) {
  constexpr const char* kOp = "ia3_linear_backward";
  const FrozenWeight held =
      checked_weight(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape);
  const Adapter adapter = ia3_adapter(kOp, ia3_l, held, feedforward);
  Tensor grad_x = empty({0}, x.scalar_type()), grad_l = empty({0}, ia3_l.scalar_type());
  // The feedforward scale's gradient comes with dX, in the same pass.
  if (needs_grad_x || (feedforward && needs_grad_l)) {
    const AdaptedBackward out = adapted_backward(kOp, grad, x, held, adapter, std::nullopt, needs_grad_x);
    if (needs_grad_x) grad_x = out.grad_x;
    if (feedforward && needs_grad_l) grad_l = torch::stable::to(out.grad_in_scale, ia3_l.scalar_type());
  }
  if (!feedforward && needs_grad_l) {
    STD_TORCH_CHECK(y.has_value(), kOp, ": y is None, wanted the forward's result");
    grad_l = torch::stable::to(output_gradient(kOp, grad, x, held, bias, *adapter.out_scale, *y), ia3_l.scalar_type());
  }
  return {grad_x, grad_l};
}

Tensor ia3_scale_cpu(Tensor x, Tensor ia3_l) {
  constexpr const char* kOp = "ia3_scale";
  const Tensor scale = float_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1));
  return column_pass(kOp, x, &scale, 0.0f, nullptr).scaled;
}

std::tuple<Tensor, Tensor> ia3_scale_backward_cpu(Tensor grad, Tensor x, Tensor ia3_l, bool needs_grad_x,
                                                  bool needs_grad_l) {
  constexpr const char* kOp = "ia3_scale_backward";
  const Tensor scale = float_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1));
  ColumnSums out = column_pass(kOp, grad, needs_grad_x ? &scale : nullptr, 0.0f, needs_grad_l ? &x : nullptr);
  return {out.scaled, torch::stable::to(out.sums, ia3_l.scalar_type())};
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("ia3_linear", TORCH_BOX(&peft_ext::ia3_linear_cpu));
  m.impl("ia3_linear_backward", TORCH_BOX(&peft_ext::ia3_linear_backward_cpu));
  m.impl("ia3_scale", TORCH_BOX(&peft_ext::ia3_scale_cpu));
  m.impl("ia3_scale_backward", TORCH_BOX(&peft_ext::ia3_scale_backward_cpu));
}
