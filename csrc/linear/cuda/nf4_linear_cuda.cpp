// The operator nf4_linear on CUDA, a linear layer over a frozen dense or packed weight: Y = x Wᵀ + b, dX = dY W. See
// linear/cuda/adapted_linear.cuh.
#include "linear/cuda/adapted_linear.cuh"

namespace peft_ext {
namespace {

Tensor nf4_linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
                       const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                       const std::optional<Tensor>& part4, int64_t layout, const std::vector<int64_t>& shape,
                       const std::optional<Tensor>& bias) {
  constexpr const char* kOp = "nf4_linear";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, x.scalar_type());
  return adapted_forward(kOp, x, held, bias, DeviceAdapter{}, false, false).y;
}

Tensor nf4_linear_backward_cuda(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& part1,
                                const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                const std::optional<Tensor>& part4, int64_t layout, const std::vector<int64_t>& shape) {
  constexpr const char* kOp = "nf4_linear_backward";
  const DeviceWeight held = device_weight(kOp, weight, {part1, part2, part3, part4}, layout, shape, grad.scalar_type());
  return frozen_backward(kOp, grad, held);
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("nf4_linear", PEFT_EXT_CUDA_BOX(&peft_ext::nf4_linear_cuda));
  m.impl("nf4_linear_backward", PEFT_EXT_CUDA_BOX(&peft_ext::nf4_linear_backward_cuda));
}
