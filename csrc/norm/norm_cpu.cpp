// The CPU operators of RMSNorm and LayerNorm: checks, allocation and threads; norm/kernels_impl.h has the kernels. A
// row is computed by one thread, and the gradients of weight and bias are first summed within chunks of tokens, so that
// the bits are equal for every number of threads.
#include <tuple>

#include "common/registration.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "linear/cpu/chunk_sums.h"
#include "norm/kernels.h"

namespace peft_ext {

const NormKernels& norm_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kNormKernelsScalar, &kNormKernelsAvx2, &kNormKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kNormKernelsScalar, &kNormKernelsNeon);
#else
  return kNormKernelsScalar;
#endif
}

namespace {

std::vector<int64_t> shape_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

int64_t columns_of(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x has no dimension, wanted [..., K]");
  return x.size(x.dim() - 1);
}

// Returns weight + offset in float32, or nullopt without a weight. A contiguous float32 weight with offset 0 is
// returned without a copy.
std::optional<Tensor> factor_of(const char* op, const std::optional<Tensor>& weight, double offset, int64_t columns) {
  if (!weight.has_value()) return std::nullopt;
  const Tensor held = float_vector(op, "weight", *weight, columns);
  if (offset == 0.0) return held;
  Tensor sum = empty({columns}, ScalarType::Float);
  const float* from = held.const_data_ptr<float>();
  float* to = sum.mutable_data_ptr<float>();
  for (int64_t k = 0; k < columns; ++k) to[k] = from[k] + static_cast<float>(offset);
  return sum;
}

// Returns the smallest number of rows that a thread computes; fewer rows would take less time than starting a thread's
// task.
int64_t row_grain(int64_t columns) { return ceil_div(kPackGrain, columns + 1); }

struct Normed {
  Tensor y, mean, rstd;
};

Normed norm(const char* op, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
            double eps, double offset, bool centered, bool round_first, ScalarType out) {
  const int64_t columns = columns_of(op, x), tokens = rows_of(x);
  const Tensor held = as_contiguous(x);
  const std::optional<Tensor> factor = factor_of(op, weight, offset, columns);
  std::optional<Tensor> shift;
  if (bias.has_value()) shift = float_vector(op, "bias", *bias, columns);
  Normed found{empty(shape_of(x), out), centered ? empty({tokens}, ScalarType::Float) : none(),
               empty({tokens}, ScalarType::Float)};
  NormRows work;
  work.dtype = dtype_of(op, "x", x);
  work.out_dtype = dtype_of(op, "x", out);
  work.columns = columns;
  work.centered = centered;
  work.round_first = round_first;
  work.eps = static_cast<float>(eps);
  work.x = held.const_data_ptr();
  work.factor = floats(factor);
  work.bias = floats(shift);
  work.y = found.y.mutable_data_ptr();
  if (centered) work.mean = found.mean.mutable_data_ptr<float>();
  work.rstd = found.rstd.mutable_data_ptr<float>();
  const NormKernels& isa = norm_kernels();
  parallel_for(0, tokens, row_grain(columns), [&](int64_t begin, int64_t end) { isa.rows(work, begin, end); });
  return found;
}

struct NormGradients {
  Tensor x, weight, bias;
};

NormGradients norm_backward(const char* op, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                            double offset, const Tensor* mean, const Tensor& rstd, bool needs_x, bool needs_weight,
                            bool needs_bias) {
  const int64_t columns = columns_of(op, x), tokens = rows_of(x);
  STD_TORCH_CHECK(grad.numel() == x.numel(), op, ": grad has ", grad.numel(), " elements, wanted ", x.numel());
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() || grad.scalar_type() == ScalarType::Float, op, ": grad is ",
                  torch::headeronly::toString(grad.scalar_type()), ", wanted x's type or Float");
  STD_TORCH_CHECK(!needs_weight || weight.has_value(), op, ": weight is None, wanted the one that is trained");
  const Tensor held_x = as_contiguous(x), held_grad = as_contiguous(grad);
  const Tensor held_rstd = float_vector(op, "rstd", rstd, tokens);
  const std::optional<Tensor> factor = needs_x ? factor_of(op, weight, offset, columns) : std::nullopt;
  std::optional<Tensor> held_mean;
  if (mean != nullptr) held_mean = float_vector(op, "mean", *mean, tokens);
  NormGradients found{none(x.scalar_type()), none(weight.has_value() ? weight->scalar_type() : ScalarType::Float),
                      none()};
  if (needs_x) found.x = empty(shape_of(x), x.scalar_type());
  NormGradient work;
  work.dtype = dtype_of(op, "x", x);
  work.grad_dtype = dtype_of(op, "grad", grad);
  work.columns = columns;
  work.centered = mean != nullptr;
  work.grad = held_grad.const_data_ptr();
  work.x = held_x.const_data_ptr();
  work.factor = floats(factor);
  work.mean = floats(held_mean);
  work.rstd = held_rstd.const_data_ptr<float>();
  if (needs_x) work.grad_x = found.x.mutable_data_ptr();
  const NormKernels& isa = norm_kernels();
  if (!needs_weight && !needs_bias) {
    if (needs_x)
      parallel_for(0, tokens, row_grain(columns), [&](int64_t begin, int64_t end) { isa.gradient(work, begin, end); });
    return found;
  }
  const int64_t of_weight = needs_weight ? columns : 0;
  Tensor sums = sum_chunks(tokens, of_weight + (needs_bias ? columns : 0), [&](int64_t first, int64_t last, float* to) {
    NormGradient part = work;
    if (needs_weight) part.grad_weight = to;
    if (needs_bias) part.grad_bias = to + of_weight;
    isa.gradient(part, first, last);
  });
  // The gradients are copies, because a view as a gradient would keep all of `sums` in memory.
  const auto copy_of = [&](int64_t first, ScalarType type) {
    Tensor out = empty({columns}, type);
    torch::stable::copy_(out, torch::stable::narrow(sums, 0, first, columns));
    return out;
  };
  if (needs_weight) found.weight = copy_of(0, weight->scalar_type());
  if (needs_bias) found.bias = copy_of(of_weight, ScalarType::Float);
  return found;
}

std::tuple<Tensor, Tensor> rms_norm_cpu(Tensor x, std::optional<Tensor> weight, double eps, double offset,
                                        bool round_before_weight) {
  // If x̂ is rounded before the product, the product of x̂ and a weight of another dtype is float32, as in PyTorch.
  const bool own = !round_before_weight || !weight.has_value() || weight->scalar_type() == x.scalar_type();
  Normed found = norm("rms_norm", x, weight, std::nullopt, eps, offset, false, round_before_weight,
                      own ? x.scalar_type() : ScalarType::Float);
  return {found.y, found.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(Tensor grad, Tensor x, std::optional<Tensor> weight, Tensor rstd,
                                                 double offset, bool needs_grad_x, bool needs_grad_weight) {
  NormGradients found = norm_backward("rms_norm_backward", grad, x, weight, offset, nullptr, rstd, needs_grad_x,
                                      needs_grad_weight, false);
  return {found.x, found.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                  double eps) {
  Normed found = norm("layer_norm", x, weight, bias, eps, 0.0, true, false, x.scalar_type());
  return {found.y, found.mean, found.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(Tensor grad, Tensor x, std::optional<Tensor> weight,
                                                           Tensor mean, Tensor rstd, bool needs_grad_x,
                                                           bool needs_grad_weight, bool needs_grad_bias) {
  NormGradients found = norm_backward("layer_norm_backward", grad, x, weight, 0.0, &mean, rstd, needs_grad_x,
                                      needs_grad_weight, needs_grad_bias);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("rms_norm", PEFT_EXT_CPU_BOX(&peft_ext::rms_norm_cpu));
  m.impl("rms_norm_backward", PEFT_EXT_CPU_BOX(&peft_ext::rms_norm_backward_cpu));
  m.impl("layer_norm", PEFT_EXT_CPU_BOX(&peft_ext::layer_norm_cpu));
  m.impl("layer_norm_backward", PEFT_EXT_CPU_BOX(&peft_ext::layer_norm_backward_cpu));
}
