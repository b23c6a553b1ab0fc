// DoRA operators on CUDA: the adapted linear layer with an output scale g = magnitude / norm, and the norm ‖W + s B A‖
// of each row. See linear/cuda/adapted_linear.cuh.
#include <tuple>

#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

DeviceAdapter dora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B, const Tensor& out_scale,
                           int64_t outputs, double scaling, double dropout_p, const std::optional<Tensor>& seed,
                           bool drop_base) {
  DeviceAdapter adapter;
  adapter.lora_A = lora_A;
  adapter.lora_B = lora_B;
  adapter.scaling = scaling;
  adapter.dropout_p = dropout_p;
  adapter.seed = device_seed(op, dropout_p, seed, lora_A);
  adapter.drop_base = drop_base;
  adapter.out_scale = device_vector(op, "out_scale", out_scale, outputs, lora_A);
  return adapter;
}

std::tuple<Tensor, Tensor> dora_weight_norm_cuda(const Tensor& weight, const std::optional<Tensor>& part1,
                                                 const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                                 const std::optional<Tensor>& part4, int64_t layout,
                                                 const std::vector<int64_t>& shape, const Tensor& lora_A,
                                                 const Tensor& lora_B, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const DeviceNorm out = weight_norm(kOp, held, lora_A, lora_B, scaling, type);
  return {out.norm, out.u};
}

std::tuple<Tensor, Tensor> dora_weight_norm_backward_cuda(
    const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& part1, const std::optional<Tensor>& part2,
    const std::optional<Tensor>& part3, const std::optional<Tensor>& part4, int64_t layout,
    const std::vector<int64_t>& shape, const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
    double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_weight_norm_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const DeviceNormGradient out = weight_norm_backward(kOp, grad, held, lora_A, lora_B, norm, u, scaling, type);
  return {out.grad_A, out.grad_B};
}

std::tuple<Tensor, Tensor, Tensor> dora_linear_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1, const std::optional<Tensor>& part2,
    const std::optional<Tensor>& part3, const std::optional<Tensor>& part4, int64_t layout,
    const std::vector<int64_t>& shape, const std::optional<Tensor>& bias, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& out_scale, double scaling, double dropout_p, const std::optional<Tensor>& seed, bool drop_base,
    bool want_z) {
  constexpr const char* kOp = "dora_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const DeviceAdapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.outputs, scaling, dropout_p, seed, drop_base);
  const DeviceForward out = adapted_forward(kOp, x, held, bias, adapter, false, want_z);
  return {out.y, out.s, out.z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dora_linear_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
    const std::optional<Tensor>& part2, const std::optional<Tensor>& part3, const std::optional<Tensor>& part4,
    int64_t layout, const std::vector<int64_t>& shape, const Tensor& lora_A, const Tensor& lora_B,
    const Tensor& out_scale, const Tensor& s, const Tensor& z, bool z_is_scaled, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, bool drop_base, bool needs_grad_x, bool needs_grad_scale) {
  constexpr const char* kOp = "dora_linear_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  const DeviceAdapter adapter =
      dora_adapter(kOp, lora_A, lora_B, out_scale, held.outputs, scaling, dropout_p, seed, drop_base);
  STD_TORCH_CHECK(!needs_grad_scale || !z_is_scaled, kOp, ": z is the output, wanted Z: on a GPU it is always kept");
  const DeviceBackward out = adapted_backward(kOp, grad, x, held, adapter, s, needs_grad_x,
                                              needs_grad_scale ? std::optional<Tensor>(z) : std::nullopt);
  return {out.grad_x, out.grad_A, out.grad_B, out.grad_out_scale};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("dora_weight_norm", PEFT_EXT_CUDA_BOX(&peft_ext::dora_weight_norm_cuda));
  m.impl("dora_weight_norm_backward", PEFT_EXT_CUDA_BOX(&peft_ext::dora_weight_norm_backward_cuda));
  m.impl("dora_linear", PEFT_EXT_CUDA_BOX(&peft_ext::dora_linear_cuda));
  m.impl("dora_linear_backward", PEFT_EXT_CUDA_BOX(&peft_ext::dora_linear_backward_cuda));
}
