// The CPU operators of plain and gated activations: checks, allocation and threads; activations/kernels_impl.h has the
// kernels. A row is computed by one thread, so that the bits are equal for every number of threads.
#include <tuple>

#include "common/registration.h"
#include "activations/glue.h"
#include "activations/kernels.h"
#include "activations/operators.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "linear/cpu/packing.h"

namespace peft_ext {

const ActivationKernels& activation_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kActivationKernelsScalar, &kActivationKernelsAvx2, &kActivationKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kActivationKernelsScalar, &kActivationKernelsNeon);
#else
  return kActivationKernelsScalar;
#endif
}

namespace {

// Returns the operands gate and up as RowsApart objects, and the sizes of the result. If `halves`, the argument `gate`
// is a tensor [..., 2F] whose first half is gate and whose second half is up. Otherwise gate is [..., F], and up is
// [..., F] or has no value.
Parts parts_of(const char* op, const Tensor& gate, const std::optional<Tensor>& up, bool halves) {
  STD_TORCH_CHECK(gate.dim() >= 1, op, ": gate has no dimension, wanted [..., F]");
  const int64_t last = gate.dim() - 1, columns = halves ? gate.size(last) / 2 : gate.size(last);
  const std::vector<int64_t> shape = with_last(gate, columns);
  if (halves) {
    STD_TORCH_CHECK(gate.size(last) % 2 == 0, op, ": gate has ", gate.size(last), " columns, wanted an even number");
    Tensor whole = gate;
    return {rows_apart(torch::stable::narrow(whole, last, 0, columns)),
            rows_apart(torch::stable::narrow(whole, last, columns, columns)), shape, rows_of(gate), columns};
  }
  if (!up.has_value()) return {rows_apart(gate), std::nullopt, shape, rows_of(gate), columns};
  STD_TORCH_CHECK(up->scalar_type() == gate.scalar_type() && has_sizes(*up, shape), op,
                  ": up is not of gate's shape and type");
  return {rows_apart(gate), rows_apart(*up), shape, rows_of(gate), columns};
}

StridedRows read(const RowsApart& rows) { return {rows.held.const_data_ptr(), rows.stride}; }

GatedRows work_of(const char* op, const Parts& parts, int64_t activation) {
  GatedRows work;
  work.activation = checked_gate(op, activation);
  work.dtype = dtype_of(op, "gate", parts.gate.held);
  work.columns = parts.columns;
  work.gate = read(parts.gate);
  if (parts.up.has_value()) work.up = read(*parts.up);
  return work;
}

// Returns the smallest number of rows that a thread computes; fewer rows would take less time than starting a thread's
// task.
int64_t row_grain(int64_t columns) { return ceil_div(kPackGrain, columns + 1); }

Tensor forward(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation, bool halves) {
  const Parts parts = parts_of(op, gate, up, halves);
  GatedRows work = work_of(op, parts, activation);
  Tensor y = empty(parts.shape, gate.scalar_type());
  work.out = {y.mutable_data_ptr(), parts.columns};
  const ActivationKernels& isa = activation_kernels();
  parallel_for(0, parts.rows, row_grain(parts.columns),
               [&](int64_t begin, int64_t end) { isa.rows(work, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& grad, const Tensor& gate,
                                    const std::optional<Tensor>& up, int64_t activation, bool halves) {
  const Parts parts = parts_of(op, gate, up, halves);
  const ScalarType type = gate.scalar_type();
  STD_TORCH_CHECK(grad.scalar_type() == type && has_sizes(grad, parts.shape), op,
                  ": grad is not of the result's shape and type");
  const RowsApart dy = rows_apart(grad);
  GatedRows work = work_of(op, parts, activation);
  Tensor grad_gate = empty({gate.sizes().begin(), gate.sizes().end()}, type);
  Tensor grad_up = up.has_value() ? empty(parts.shape, type) : none(type);
  work.grad = read(dy);
  work.out = {grad_gate.mutable_data_ptr(), halves ? 2 * parts.columns : parts.columns};
  if (up.has_value()) work.out_up = {grad_up.mutable_data_ptr(), parts.columns};
  if (halves) {
    const int64_t width = type == ScalarType::Float ? 4 : 2;
    work.out_up = {static_cast<char*>(work.out.data) + parts.columns * width, work.out.stride};
  }
  const ActivationKernels& isa = activation_kernels();
  parallel_for(0, parts.rows, row_grain(parts.columns),
               [&](int64_t begin, int64_t end) { isa.gradient(work, begin, end); });
  return {grad_gate, grad_up};
}

}  // namespace

Tensor cpu_gated_value(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  return forward(op, gate, up, activation, !up.has_value());
}

std::tuple<Tensor, Tensor> cpu_gated_gradients(const char* op, const Tensor& grad, const Tensor& gate,
                                               const std::optional<Tensor>& up, int64_t activation) {
  return backward(op, grad, gate, up, activation, !up.has_value());
}

Tensor gated_activation_cpu(Tensor gate, std::optional<Tensor> up, int64_t activation) {
  return cpu_gated_value("gated_activation", gate, up, activation);
}

namespace {

std::tuple<Tensor, Tensor> gated_activation_backward_cpu(Tensor grad, Tensor gate, std::optional<Tensor> up,
                                                         int64_t activation) {
  return cpu_gated_gradients("gated_activation_backward", grad, gate, up, activation);
}

Tensor activation_cpu(Tensor x, int64_t activation) {
  return forward("activation", x, std::nullopt, activation, false);
}

Tensor activation_backward_cpu(Tensor grad, Tensor x, int64_t activation) {
  return std::get<0>(backward("activation_backward", grad, x, std::nullopt, activation, false));
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("gated_activation", PEFT_EXT_CPU_BOX(&peft_ext::gated_activation_cpu));
  m.impl("gated_activation_backward", PEFT_EXT_CPU_BOX(&peft_ext::gated_activation_backward_cpu));
  m.impl("activation", PEFT_EXT_CPU_BOX(&peft_ext::activation_cpu));
  m.impl("activation_backward", PEFT_EXT_CPU_BOX(&peft_ext::activation_backward_cpu));
}
