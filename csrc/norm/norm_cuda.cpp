// RMSNorm and LayerNorm on CUDA; the kernels are in norm.cuh. The forward is one launch of norm_kernel. The backward is
// one launch for dX, one launch for the partial sums of the gradients of weight and bias, and for each of these two
// gradients a launch that adds the partial sums. Gradients that are not needed have no launches.
#include "norm/norm.cuh"

#include <tuple>

#include "cuda/tensor.cuh"

namespace peft_ext {
namespace {

struct Normed {
  Tensor y, mean, rstd;
};

std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

int64_t checked_columns(const char* op, const Tensor& x, const std::optional<Tensor>& weight) {
  STD_TORCH_CHECK(on_device(x) && x.dim() >= 1, op, ": x is not [..., K] on a CUDA device");
  check_kernel_dtype(op, "x", x.scalar_type());
  const int64_t columns = x.size(x.dim() - 1);
  if (weight.has_value()) {
    check_matrix(op, "weight", *weight, x);
    STD_TORCH_CHECK(weight->numel() == columns, op, ": weight has ", weight->numel(), " elements, wanted ", columns);
  }
  return columns;
}

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

// Returns a NormWork with the arguments that norm_kernel and norm_gradient_kernel share. The caller must keep the
// weight alive until the launch.
NormWork norm_work(const Launcher& launcher, const std::optional<Tensor>& weight, double offset, int64_t rows,
                   int64_t columns) {
  NormWork work{};
  if (weight.has_value()) {
    work.weight = launcher.in<void>(*weight);
    work.weight_type = dtype_of(weight->scalar_type());
    work.weight_whole = whole_columns(*weight, columns);
  }
  work.offset = static_cast<float>(offset);
  work.rows = rows;
  work.columns = columns;
  work.row_threads = norm_row_threads(columns);
  return work;
}

int64_t norm_blocks(const NormWork& work) { return ceil_div(work.rows, kNormThreads / work.row_threads); }

// Calls f with a zero of the C++ type of `type` and a zero of the C++ type of `other`, which is `type` or float32.
template <typename F>
void with_own_or_float(ScalarType type, ScalarType other, F f) {
  with_type(type, [&](auto zero) {
    if (other == ScalarType::Float)
      f(zero, 0.0f);
    else
      f(zero, zero);
  });
}

Normed norm(const char* op, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
            double eps, double offset, bool centered, bool round_first, ScalarType out) {
  const int64_t columns = checked_columns(op, x, weight), rows = device_rows(x);
  const Tensor y = device_empty(x, shape_of(x), out);
  const Tensor mean = device_empty(x, {centered ? rows : 0}, ScalarType::Float);
  const Tensor rstd = device_empty(x, {rows}, ScalarType::Float);
  if (rows == 0) return {y, mean, rstd};
  const Tensor held = as_contiguous(x);
  const std::optional<Tensor> held_weight = contiguous_or_none(weight), held_bias = contiguous_or_none(bias);
  Launcher launcher(x);
  NormWork work = norm_work(launcher, held_weight, offset, rows, columns);
  work.x = launcher.in<void>(held);
  if (held_bias.has_value()) {
    check_matrix(op, "bias", *held_bias, x);
    STD_TORCH_CHECK(held_bias->numel() == columns, op, ": bias has ", held_bias->numel(), " elements, wanted ",
                    columns);
    work.bias = launcher.in<void>(*held_bias);
    work.bias_type = dtype_of(held_bias->scalar_type());
    work.bias_whole = whole_columns(*held_bias, columns);
  }
  work.out = launcher.out<void>(y);
  if (centered) work.mean = launcher.out<float>(mean);
  work.rstd = launcher.out<float>(rstd);
  work.eps = static_cast<float>(eps);
  work.round_first = round_first;
  work.whole = whole_columns(held, columns) && whole_columns(y, columns);
  with_own_or_float(x.scalar_type(), out, [&](auto zero, auto of_out) {
    using T = decltype(zero);
    using Out = decltype(of_out);
    launcher(centered ? norm_kernel<T, Out, true> : norm_kernel<T, Out, false>, norm_blocks(work), kNormThreads, work);
  });
  return {y, mean, rstd};
}

// Adds the partial sums [chunks, columns] in the order of the chunks. Returns the sums [columns], converted to `type`.
Tensor column_sums(const Launcher& launcher, const Tensor& like, const Tensor& partial, ScalarType type) {
  const int64_t columns = partial.size(1);
  const Tensor sums = device_empty(like, {columns}, ScalarType::Float);
  launcher(column_reduce_kernel, ceil_div(columns, kColumnThreads), kColumnThreads, launcher.in<float>(partial),
           partial.size(0), columns, launcher.out<float>(sums));
  return as_type(sums, type);
}

struct NormGradients {
  Tensor x, weight, bias;
};

NormGradients norm_backward(const char* op, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                            double offset, const Tensor* mean, const Tensor& rstd, bool needs_x, bool needs_weight,
                            bool needs_bias) {
  const int64_t columns = checked_columns(op, x, weight), rows = device_rows(x);
  STD_TORCH_CHECK(same_device(grad, x) && grad.numel() == x.numel(), op, ": grad has ", grad.numel(),
                  " elements, wanted ", x.numel(), " on x's device");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() || grad.scalar_type() == ScalarType::Float, op, ": grad is ",
                  torch::headeronly::toString(grad.scalar_type()), ", wanted x's type or Float");
  STD_TORCH_CHECK(!needs_weight || weight.has_value(), op, ": weight is None, wanted the one that is trained");
  const ScalarType type = x.scalar_type(), of_weight = weight.has_value() ? weight->scalar_type() : ScalarType::Float;
  NormGradients found{device_empty(x, needs_x ? shape_of(x) : std::vector<int64_t>{0}, type),
                      device_zeros(x, {needs_weight ? columns : 0}, of_weight),
                      device_zeros(x, {needs_bias ? columns : 0}, ScalarType::Float)};
  if (rows == 0 || columns == 0) return found;
  const Tensor held_x = as_contiguous(x), held_grad = as_contiguous(grad);
  const Tensor held_rstd = device_vector(op, "rstd", rstd, rows, x);
  const std::optional<Tensor> held_weight = contiguous_or_none(weight);
  std::optional<Tensor> held_mean;
  if (mean != nullptr) held_mean = device_vector(op, "mean", *mean, rows, x);
  const bool whole = whole_columns(held_x, columns) && whole_columns(held_grad, columns);
  Launcher launcher(x);
  if (needs_x) {
    NormWork work = norm_work(launcher, held_weight, offset, rows, columns);
    work.x = launcher.in<void>(held_x);
    work.grad = launcher.in<void>(held_grad);
    work.mean = const_cast<float*>(launcher.in<float>(held_mean));
    work.rstd = const_cast<float*>(launcher.in<float>(held_rstd));
    work.out = launcher.out<void>(found.x);
    work.whole = whole && whole_columns(found.x, columns);
    with_own_or_float(type, grad.scalar_type(), [&](auto zero, auto of_grad) {
      using T = decltype(zero);
      using Grad = decltype(of_grad);
      launcher(mean != nullptr ? norm_gradient_kernel<T, Grad, true> : norm_gradient_kernel<T, Grad, false>,
               norm_blocks(work), kNormThreads, work);
    });
  }
  if (!needs_weight && !needs_bias) return found;
  const int64_t chunks = ceil_div(rows, kColumnRows);
  const Tensor weight_sums = device_empty(x, {needs_weight ? chunks : 0, columns}, ScalarType::Float);
  const Tensor bias_sums = device_empty(x, {needs_bias ? chunks : 0, columns}, ScalarType::Float);
  NormColumns work{};
  work.x = launcher.in<void>(held_x);
  work.grad = launcher.in<void>(held_grad);
  work.mean = launcher.in<float>(held_mean);
  work.rstd = launcher.in<float>(held_rstd);
  if (needs_weight) work.weight_sums = launcher.scratch<float>(weight_sums);
  if (needs_bias) work.bias_sums = launcher.scratch<float>(bias_sums);
  work.rows = rows;
  work.columns = columns;
  work.whole = whole;
  with_own_or_float(type, grad.scalar_type(), [&](auto zero, auto of_grad) {
    launcher(norm_columns_kernel<decltype(zero), decltype(of_grad)>, {chunks, ceil_div(columns, kColumnTile)},
             kColumnThreads, work);
  });
  if (needs_weight) found.weight = column_sums(launcher, x, weight_sums, of_weight);
  if (needs_bias) found.bias = column_sums(launcher, x, bias_sums, ScalarType::Float);
  return found;
}

std::tuple<Tensor, Tensor> rms_norm_cuda(const Tensor& x, const std::optional<Tensor>& weight, double eps,
                                         double offset, bool round_before_weight) {
  // If x̂ is rounded before the product, the product of x̂ and a weight of another dtype is float32, as in PyTorch.
  const bool own = !round_before_weight || !weight.has_value() || weight->scalar_type() == x.scalar_type();
  const Normed found = norm("rms_norm", x, weight, std::nullopt, eps, offset, false, round_before_weight,
                            own ? x.scalar_type() : ScalarType::Float);
  return {found.y, found.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cuda(const Tensor& grad, const Tensor& x,
                                                  const std::optional<Tensor>& weight, const Tensor& rstd,
                                                  double offset, bool needs_grad_x, bool needs_grad_weight) {
  const NormGradients found = norm_backward("rms_norm_backward", grad, x, weight, offset, nullptr, rstd, needs_grad_x,
                                            needs_grad_weight, false);
  return {found.x, found.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& bias, double eps) {
  const Normed found = norm("layer_norm", x, weight, bias, eps, 0.0, true, false, x.scalar_type());
  return {found.y, found.mean, found.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& grad, const Tensor& x,
                                                            const std::optional<Tensor>& weight, const Tensor& mean,
                                                            const Tensor& rstd, bool needs_grad_x,
                                                            bool needs_grad_weight, bool needs_grad_bias) {
  const NormGradients found = norm_backward("layer_norm_backward", grad, x, weight, 0.0, &mean, rstd, needs_grad_x,
                                            needs_grad_weight, needs_grad_bias);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("rms_norm", PEFT_EXT_CUDA_BOX(&peft_ext::rms_norm_cuda));
  m.impl("rms_norm_backward", PEFT_EXT_CUDA_BOX(&peft_ext::rms_norm_backward_cuda));
  m.impl("layer_norm", PEFT_EXT_CUDA_BOX(&peft_ext::layer_norm_cuda));
  m.impl("layer_norm_backward", PEFT_EXT_CUDA_BOX(&peft_ext::layer_norm_backward_cuda));
}
