// The CUDA operators of plain and gated activations. Each call is one launch of the kernel in activations.cuh.
#include "activations/activations.cuh"

#include <tuple>

#include "activations/glue.h"
#include "cuda/tensor.cuh"

namespace peft_ext {
namespace {

// Returns the operands gate and up as RowsApart objects, and the sizes of the result. If `halves`, the argument `gate`
// is a tensor [..., 2F] whose first half is gate and whose second half is up. Otherwise gate is [..., F], and up is
// [..., F] or has no value.
Parts parts_of(const char* op, const Tensor& gate, const std::optional<Tensor>& up, bool halves) {
  STD_TORCH_CHECK(on_device(gate) && gate.dim() >= 1, op, ": gate is not [..., F] on a CUDA device");
  check_kernel_dtype(op, "gate", gate.scalar_type());
  const int64_t last = gate.dim() - 1, columns = halves ? gate.size(last) / 2 : gate.size(last);
  std::vector<int64_t> shape(gate.sizes().begin(), gate.sizes().end());
  shape.back() = columns;
  if (halves) {
    Tensor whole = gate;
    return {rows_apart(torch::stable::narrow(whole, last, 0, columns)),
            rows_apart(torch::stable::narrow(whole, last, columns, columns)), shape, device_rows(gate), columns};
  }
  if (!up.has_value()) return {rows_apart(gate), std::nullopt, shape, device_rows(gate), columns};
  check_matrix(op, "up", *up, gate);
  STD_TORCH_CHECK(up->scalar_type() == gate.scalar_type() && has_sizes(*up, shape), op,
                  ": up is not of gate's shape and type");
  return {rows_apart(gate), rows_apart(*up), shape, device_rows(gate), columns};
}

bool whole_rows(const Tensor& tensor, int64_t stride) { return stride % kVector == 0 && aligned(tensor, 16); }

GatedWork work_of(const Launcher& launcher, const Parts& parts, Activation activation) {
  GatedWork work{};
  work.activation = activation;
  work.columns = parts.columns;
  work.gate = launcher.in<void>(parts.gate.held);
  work.gate_stride = parts.gate.stride;
  work.whole = parts.columns % kVector == 0 && whole_rows(parts.gate.held, parts.gate.stride);
  if (parts.up.has_value()) {
    work.up = launcher.in<void>(parts.up->held);
    work.up_stride = parts.up->stride;
    work.whole = work.whole && whole_rows(parts.up->held, parts.up->stride);
  }
  return work;
}

template <bool kGradient>
void run(const Launcher& launcher, const GatedWork& work, const Parts& parts) {
  with_type(parts.gate.held.scalar_type(), [&](auto zero) {
    launcher(gated_kernel<decltype(zero), kGradient>, {parts.rows, ceil_div(parts.columns, kGatedTile)}, kGatedThreads,
             work);
  });
}

Tensor forward(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, bool halves) {
  const Parts parts = parts_of(op, gate, up, halves);
  const Activation kind = checked_gate(op, activation);
  const Tensor y = device_empty(gate, parts.shape, gate.scalar_type());
  Launcher launcher(gate);
  GatedWork work = work_of(launcher, parts, kind);
  work.out = launcher.out<void>(y);
  work.out_stride = parts.columns;
  work.whole = work.whole && aligned(y, 16);
  run<false>(launcher, work, parts);
  return y;
}

std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& grad, const Tensor& gate,
                                    const std::optional<Tensor>& up, int64_t activation, bool halves) {
  const Parts parts = parts_of(op, gate, up, halves);
  const Activation kind = checked_gate(op, activation);
  const ScalarType type = gate.scalar_type();
  STD_TORCH_CHECK(same_device(grad, gate) && grad.scalar_type() == type && has_sizes(grad, parts.shape), op,
                  ": grad is not of the result's shape and type on gate's device");
  const RowsApart dy = rows_apart(grad);
  const bool two = up.has_value();
  const Tensor grad_gate = device_empty(gate, {gate.sizes().begin(), gate.sizes().end()}, type);
  const Tensor grad_up = device_empty(gate, two ? parts.shape : std::vector<int64_t>{0}, type);
  Launcher launcher(gate);
  GatedWork work = work_of(launcher, parts, kind);
  work.grad = launcher.in<void>(dy.held);
  work.grad_stride = dy.stride;
  work.out = launcher.out<void>(grad_gate);
  work.out_stride = halves ? 2 * parts.columns : parts.columns;
  work.out_up_stride = work.out_stride;
  if (two) work.out_up = launcher.out<void>(grad_up);
  if (halves) {
    const int64_t width = type == ScalarType::Float ? 4 : 2;
    work.out_up = static_cast<char*>(work.out) + parts.columns * width;
  }
  work.whole = work.whole && whole_rows(dy.held, dy.stride) && aligned(grad_gate, 16) && (!two || aligned(grad_up, 16));
  run<true>(launcher, work, parts);
  return {grad_gate, grad_up};
}

Tensor gated_activation_cuda(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  return forward("gated_activation", gate, up, activation, !up.has_value());
}

std::tuple<Tensor, Tensor> gated_activation_backward_cuda(const Tensor& grad, const Tensor& gate,
                                                          const std::optional<Tensor>& up, int64_t activation) {
  return backward("gated_activation_backward", grad, gate, up, activation, !up.has_value());
}

Tensor activation_cuda(const Tensor& x, int64_t activation) {
  return forward("activation", x, std::nullopt, activation, false);
}

Tensor activation_backward_cuda(const Tensor& grad, const Tensor& x, int64_t activation) {
  return std::get<0>(backward("activation_backward", grad, x, std::nullopt, activation, false));
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("gated_activation", PEFT_EXT_CUDA_BOX(&peft_ext::gated_activation_cuda));
  m.impl("gated_activation_backward", PEFT_EXT_CUDA_BOX(&peft_ext::gated_activation_backward_cuda));
  m.impl("activation", PEFT_EXT_CUDA_BOX(&peft_ext::activation_cuda));
  m.impl("activation_backward", PEFT_EXT_CUDA_BOX(&peft_ext::activation_backward_cuda));
}
