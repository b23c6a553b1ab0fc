// Defines the IA3 operators on CUDA: a linear layer whose input or output is scaled by the vector l (the argument
// ia3_l), and the scaling alone. See linear/cuda/adapted_linear.cuh.
//
//   output:       Y = l ∘ (x Wᵀ + b)    dX = (l ∘ dY) W    dl = Σ_t dY ∘ (x Wᵀ + b).
//   feedforward:  Y = (l ∘ x) Wᵀ + b    dX = l ∘ U         dl = Σ_t x ∘ U,  U = dY W.
//
// If l scales the output, one pass over dY computes dl. If dX is wanted and W is not multiplied by l (folds_scale),
// this pass also computes l ∘ dY. If l scales the input (feedforward), one pass over U computes dX and dl.
#include <tuple>

#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

DeviceAdapter ia3_adapter(const char* op, const Tensor& ia3_l, const DeviceWeight& weight, bool feedforward) {
  DeviceAdapter adapter;
  const int64_t size = feedforward ? weight.inputs : weight.outputs;
  (feedforward ? adapter.in_scale : adapter.out_scale) = device_vector(op, "ia3_l", ia3_l, size, weight.weight);
  return adapter;
}

std::tuple<Tensor, Tensor> ia3_linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
                                           const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                           const std::optional<Tensor>& part4, int64_t layout,
                                           const std::vector<int64_t>& shape, const std::optional<Tensor>& bias,
                                           const Tensor& ia3_l, bool feedforward, bool want_z) {
  constexpr const char* kOp = "ia3_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const DeviceForward out =
      adapted_forward(kOp, x, held, bias, ia3_adapter(kOp, ia3_l, held, feedforward), true, want_z);
  return {out.y, out.z};
}

std::tuple<Tensor, Tensor> ia3_linear_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
    const std::optional<Tensor>& part2, const std::optional<Tensor>& part3, const std::optional<Tensor>& part4,
    int64_t layout, const std::vector<int64_t>& shape, const std::optional<Tensor>&, const Tensor& ia3_l,
    const std::optional<Tensor>& z, bool z_is_scaled, bool feedforward, bool needs_grad_x, bool needs_grad_l) {
  constexpr const char* kOp = "ia3_linear_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const bool of_outputs = !feedforward && needs_grad_l;
  STD_TORCH_CHECK(!of_outputs || (z.has_value() && !z_is_scaled), kOp,
                  ": z is None or the output, wanted Z: on a GPU it is always kept");
  const DeviceBackward out = adapted_backward(kOp, grad, x, held, ia3_adapter(kOp, ia3_l, held, feedforward),
                                              std::nullopt, needs_grad_x, of_outputs ? z : std::nullopt);
  if (!needs_grad_l) return {out.grad_x, device_empty(ia3_l, {0}, ia3_l.scalar_type())};
  return {out.grad_x, like(feedforward ? out.grad_in_scale : out.grad_out_scale, ia3_l)};
}

Tensor ia3_scale_cuda(const Tensor& x, const Tensor& ia3_l) {
  constexpr const char* kOp = "ia3_scale";
  STD_TORCH_CHECK(on_device(x), kOp, ": x is not on a CUDA device");
  return scale_columns(x, device_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1), x), std::nullopt).scaled;
}

std::tuple<Tensor, Tensor> ia3_scale_backward_cuda(const Tensor& grad, const Tensor& x, const Tensor& ia3_l,
                                                   bool needs_grad_x, bool needs_grad_l) {
  constexpr const char* kOp = "ia3_scale_backward";
  STD_TORCH_CHECK(on_device(x), kOp, ": x is not on a CUDA device");
  check_same_device(kOp, "grad", grad, x);
  STD_TORCH_CHECK(same_sizes(grad, x) && grad.scalar_type() == x.scalar_type(), kOp,
                  ": grad is not of x's shape and type");
  std::optional<Tensor> scale, other;
  if (needs_grad_x) scale = device_vector(kOp, "ia3_l", ia3_l, x.size(x.dim() - 1), x);
  if (needs_grad_l) other = x;
  const ColumnProducts out = scale_columns(grad, scale, other);
  return {out.scaled, needs_grad_l ? like(out.sums, ia3_l) : device_empty(ia3_l, {0}, ia3_l.scalar_type())};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("ia3_linear", PEFT_EXT_CUDA_BOX(&peft_ext::ia3_linear_cuda));
  m.impl("ia3_linear_backward", PEFT_EXT_CUDA_BOX(&peft_ext::ia3_linear_backward_cuda));
  m.impl("ia3_scale", PEFT_EXT_CUDA_BOX(&peft_ext::ia3_scale_cuda));
  m.impl("ia3_scale_backward", PEFT_EXT_CUDA_BOX(&peft_ext::ia3_scale_backward_cuda));
}
