// The CUDA operators of plain and gated activations. Each call is one launch of the kernel in activations.cuh.
#include <tuple>

#include "activations/gated_call.cuh"

namespace peft_ext {

Parts gated_parts(const char* op, const Tensor& gate, const std::optional<Tensor>& up, bool halves) {
  STD_TORCH_CHECK(on_device(gate) && gate.dim() >= 1, op, ": gate is not [..., F] on a CUDA device");
  check_kernel_dtype(op, "gate", gate.scalar_type());
  const int64_t last = gate.dim() - 1, columns = halves ? gate.size(last) / 2 : gate.size(last);
  std::vector<int64_t> shape(gate.sizes().begin(), gate.sizes().end());
  shape.back() = columns;
  if (halves) {
    STD_TORCH_CHECK(gate.size(last) % 2 == 0, op, ": gate has ", gate.size(last), " columns, wanted an even number");
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

namespace {

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
  const Parts parts = gated_parts(op, gate, up, halves);
  const Activation kind = checked_gate(op, activation);
  const Tensor y = device_empty(gate, parts.shape, gate.scalar_type());
  Launcher launcher(gate);
  run<false>(launcher, gated_value_work(launcher, parts, kind, y), parts);
  return y;
}

GatedGradients backward(const char* op, const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                        int64_t activation, bool halves) {
  const Parts parts = gated_parts(op, gate, up, halves);
  const Activation kind = checked_gate(op, activation);
  STD_TORCH_CHECK(same_device(grad, gate) && grad.scalar_type() == gate.scalar_type() && has_sizes(grad, parts.shape),
                  op, ": grad is not of the result's shape and type on gate's device");
  const RowsApart dy = rows_apart(grad);
  const GatedGradients out = empty_gated_gradients(gate, up);
  Launcher launcher(gate);
  run<true>(launcher, gated_gradient_work(launcher, parts, kind, dy, out), parts);
  return out;
}

}  // namespace

GatedGradients empty_gated_gradients(const Tensor& gate, const std::optional<Tensor>& up) {
  return {device_empty_like(gate),
          up.has_value() ? device_empty_like(*up) : device_empty(gate, {0}, gate.scalar_type())};
}

GatedWork gated_value_work(const Launcher& launcher, const Parts& parts, Activation activation, const Tensor& y) {
  GatedWork work = work_of(launcher, parts, activation);
  work.out = launcher.out<void>(y);
  work.out_stride = parts.columns;
  work.whole = work.whole && aligned(y, 16);
  return work;
}

GatedWork gated_gradient_work(const Launcher& launcher, const Parts& parts, Activation activation, const RowsApart& dy,
                              const GatedGradients& out) {
  const int64_t width = out.gate.size(out.gate.dim() - 1);
  const bool halves = width != parts.columns;
  GatedWork work = work_of(launcher, parts, activation);
  work.grad = launcher.in<void>(dy.held);
  work.grad_stride = dy.stride;
  work.out = launcher.out<void>(out.gate);
  work.out_stride = work.out_up_stride = width;
  if (halves) {
    work.out_up = static_cast<char*>(work.out) + parts.columns * out.gate.element_size();
  } else if (parts.up.has_value()) {
    work.out_up = launcher.out<void>(out.up);
  }
  work.whole = work.whole && whole_rows(dy.held, dy.stride) && aligned(out.gate, 16) &&
               (halves || !parts.up.has_value() || aligned(out.up, 16));
  return work;
}

Tensor gated_value(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  return forward(op, gate, up, activation, !up.has_value());
}

GatedGradients gated_gradients(const char* op, const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                               int64_t activation) {
  return backward(op, grad, gate, up, activation, !up.has_value());
}

namespace {

Tensor gated_activation_cuda(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  return gated_value("gated_activation", gate, up, activation);
}

std::tuple<Tensor, Tensor> gated_activation_backward_cuda(const Tensor& grad, const Tensor& gate,
                                                          const std::optional<Tensor>& up, int64_t activation) {
  const GatedGradients out = gated_gradients("gated_activation_backward", grad, gate, up, activation);
  return {out.gate, out.up};
}

Tensor activation_cuda(const Tensor& x, int64_t activation) {
  return forward("activation", x, std::nullopt, activation, false);
}

Tensor activation_backward_cuda(const Tensor& grad, const Tensor& x, int64_t activation) {
  return backward("activation_backward", grad, x, std::nullopt, activation, false).gate;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("gated_activation", PEFT_EXT_CUDA_BOX(&peft_ext::gated_activation_cuda));
  m.impl("gated_activation_backward", PEFT_EXT_CUDA_BOX(&peft_ext::gated_activation_backward_cuda));
  m.impl("activation", PEFT_EXT_CUDA_BOX(&peft_ext::activation_cuda));
  m.impl("activation_backward", PEFT_EXT_CUDA_BOX(&peft_ext::activation_backward_cuda));
}
