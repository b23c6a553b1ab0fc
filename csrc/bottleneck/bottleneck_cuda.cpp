// The bottleneck adapter on CUDA: U = x Dᵀ + b_d, H = act(U), Y = residual + s (H Vᵀ + b_v), with the down weight D and
// the up weight V. The steps:
//
//   forward:   U in one pass over x (rank_pass); H; Y in one pass that reads the residual and writes Y (expand).
//   backward:  P = s dY V (the gradient of H), dV and db_v in passes over dY; dU; dD in a pass over x; dX = dY + dU D
//              in one pass that reads dY and writes dX (if the residual is not x, dX is dU D, and the pass does not
//              read dY).
#include "bottleneck/bottleneck.cuh"
#include "bottleneck/checked_activation.h"

#include <string>
#include <tuple>

#include "linear/cuda/passes.cuh"

namespace peft_ext {
namespace {

struct Bottleneck {
  int64_t tokens, in, out, size;
};

Bottleneck checked_sizes(const char* op, const Tensor& x, const Tensor& down, const Tensor& up) {
  check_matrix(op, "down_weight", down, x);
  check_matrix(op, "up_weight", up, x);
  STD_TORCH_CHECK(x.dim() >= 1 && down.dim() == 2 && up.dim() == 2 && down.size(1) == x.size(x.dim() - 1) &&
                      up.size(1) == down.size(0),
                  op, ": down_weight and up_weight are not [M, K] and [N, M] for x [..., K]");
  STD_TORCH_CHECK(down.numel() > 0 && up.numel() > 0, op,
                  ": down_weight or up_weight has no elements, wanted at least one row and column");
  return {device_rows(x), down.size(1), up.size(0), down.size(0)};
}

template <bool kGradient>
void run(const Launcher& launcher, BottleneckWork& work, const Bottleneck& size, const HeldTerms* terms,
         const HeldTerms* transposed) {
  work.rows = size.tokens;
  work.size = size.size;
  const Terms& like = terms != nullptr ? terms->terms : transposed->terms;
  work.padded_rows = terms != nullptr ? like.outer : like.inner;
  work.padded_size = terms != nullptr ? like.inner : like.outer;
  if (terms != nullptr) work.terms = write_terms(launcher, *terms);
  if (transposed != nullptr) work.transposed = write_terms(launcher, *transposed);
  launcher(bottleneck_kernel<kGradient>, ceil_div(work.padded_rows * work.padded_size / 2, kBottleneckThreads),
           kBottleneckThreads, work);
}

std::tuple<Tensor, Tensor> bottleneck_adapter_cuda(Tensor x, std::optional<Tensor> residual, Tensor down_weight,
                                                   std::optional<Tensor> down_bias, Tensor up_weight,
                                                   std::optional<Tensor> up_bias, double scale, int64_t activation) {
  constexpr const char* kOp = "bottleneck_adapter";
  const Bottleneck size = checked_sizes(kOp, x, down_weight, up_weight);
  const ScalarType type = x.scalar_type();
  const Tensor y = device_empty(x, shape_with_last(x, size.out), type);
  const Tensor u = device_empty(x, {size.tokens, size.size}, ScalarType::Float);
  if (size.tokens == 0) return {y, u};
  const Tensor held = flat_rows(x), onto = residual.has_value() ? flat_rows(*residual) : held;
  STD_TORCH_CHECK(
      same_device(onto, x) && onto.size(0) == size.tokens && onto.size(1) == size.out && onto.scalar_type() == type,
      kOp, ": residual is not [..., ", size.out, "] of x's type on its device");
  const Tensor down = as_contiguous(down_weight), up = as_contiguous(up_weight);
  const int64_t padded = padded_rank(size.size);
  Splitter splitter(x, type);
  const HeldTerms right = splitter.right_of_pass(down, false), up_terms = splitter.right_of_expand(up, false);
  splitter.run();
  const PartialSums sums = rank_pass(dense_input(held), &right, nullptr).rows;

  const HeldTerms h = left_terms(x, size.tokens, padded, type);
  {
    Launcher launcher(x);
    BottleneckWork work{};
    work.activation = checked_activation(kOp, activation);
    work.u = launcher.scratch<float>(u);
    work.sums = launcher.in<float>(sums.sums);
    work.chunks = sums.chunks;
    work.sums_rows = sums.padded_rows;
    work.sums_columns = padded;
    const std::optional<Tensor> bias =
        down_bias.has_value() ? std::optional<Tensor>(device_vector(kOp, "down_bias", *down_bias, size.size, x))
                              : std::nullopt;
    work.bias = launcher.in<float>(bias);
    work.scale = static_cast<float>(scale);
    run<false>(launcher, work, size, &h, nullptr);
  }
  std::optional<Tensor> bias;
  if (up_bias.has_value()) bias = device_vector(kOp, "up_bias", *up_bias, size.out, x);
  expand(as_shape(y, {size.tokens, size.out}), &h, &up_terms, &onto, bias, std::nullopt, scale);
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward_cuda(Tensor grad, Tensor x, Tensor u,
                                                                                    Tensor down_weight,
                                                                                    Tensor up_weight, double scale,
                                                                                    int64_t activation, bool own,
                                                                                    bool needs_grad_x) {
  constexpr const char* kOp = "bottleneck_adapter_backward";
  const Bottleneck size = checked_sizes(kOp, x, down_weight, up_weight);
  const ScalarType type = x.scalar_type();
  check_tensor(kOp, "grad", grad, type, size.tokens * size.out, x);
  STD_TORCH_CHECK(!own || size.in == size.out, kOp, ": x is the residual, and up_weight has ", size.out,
                  " rows, wanted ", size.in);
  check_tensor(kOp, "u", u, ScalarType::Float, size.tokens * size.size, x);
  Tensor grad_x = device_empty(x, {0}, type);
  if (needs_grad_x) grad_x = device_empty(x, {x.sizes().begin(), x.sizes().end()}, type);
  if (size.tokens == 0) {
    return {grad_x, device_zeros(x, {size.size, size.in}, down_weight.scalar_type()),
            device_zeros(x, {size.size}, ScalarType::Float),
            device_zeros(x, {size.out, size.size}, up_weight.scalar_type()),
            device_zeros(x, {size.out}, ScalarType::Float)};
  }
  const Tensor flat_grad = flat_rows(grad), flat_x = flat_rows(x), held_u = as_contiguous(u);
  const Tensor down = as_contiguous(down_weight), up = as_contiguous(up_weight);
  // L, the left operand of the rank pass, is Hᵀ (H = act(U)) and one row of ones, from which the gradient of the up
  // bias is computed.
  const int64_t padded = padded_rank(size.size), padded_left = padded_rank(size.size + 1);
  Splitter splitter(x, type);
  const HeldTerms right = splitter.right_of_pass(up, true);
  HeldTerms down_terms;
  if (needs_grad_x) down_terms = splitter.right_of_expand(down, true);
  splitter.run();
  const HeldTerms left = pass_terms(x, padded_left, size.tokens);
  BottleneckWork work{};
  work.activation = checked_activation(kOp, activation);
  work.scale = 1.0f;
  {
    Launcher launcher(x);
    work.u = const_cast<float*>(launcher.in<float>(held_u));
    work.ones = true;
    run<false>(launcher, work, size, nullptr, &left);
  }
  const PassSums sums = rank_pass(dense_input(flat_grad), &right, &left);
  const Tensor p = device_empty(x, {size.tokens, size.size}, ScalarType::Float);
  Tensor products = device_empty(x, {size.out, size.size + 1}, ScalarType::Float);
  Reduced wanted;
  wanted.scale = scale;
  wanted.plain = &p;
  reduce(sums.rows, size.size, wanted);
  wanted.plain = &products;
  reduce(sums.columns, size.size + 1, wanted);
  const Tensor grad_up =
      as_contiguous(as_type(torch::stable::narrow(products, 1, 0, size.size), up_weight.scalar_type()));
  const Tensor grad_up_bias = as_shape(as_contiguous(torch::stable::narrow(products, 1, size.size, 1)), {size.out});

  const Tensor grad_u = device_empty(x, {size.tokens, size.size}, ScalarType::Float);
  const Tensor grad_down_bias = device_empty(x, {size.size}, ScalarType::Float);
  const HeldTerms transposed = pass_terms(x, padded, size.tokens);
  HeldTerms terms;
  if (needs_grad_x) terms = left_terms(x, size.tokens, padded, type);
  {
    Launcher launcher(x);
    work.u = const_cast<float*>(launcher.in<float>(held_u));
    work.ones = false;
    work.grad_h = launcher.in<float>(p);
    work.grad_u = launcher.scratch<float>(grad_u);
    work.terms = work.transposed = TermsOut{};
    run<true>(launcher, work, size, needs_grad_x ? &terms : nullptr, &transposed);
    launcher(bottleneck_bias_kernel<kBottleneckThreads>, size.size, kBottleneckThreads, work.grad_u, size.tokens,
             size.size, launcher.scratch<float>(grad_down_bias));
  }
  const Tensor grad_down = device_empty(x, {size.size, size.in}, down_weight.scalar_type());
  Reduced grad_d;
  grad_d.out = &grad_down;
  grad_d.row_stride = 1;
  grad_d.rank_stride = size.in;
  reduce(rank_pass(dense_input(flat_x), nullptr, &transposed).columns, size.size, grad_d);
  if (needs_grad_x) {
    expand(as_shape(grad_x, {size.tokens, size.in}), &terms, &down_terms, own ? &flat_grad : nullptr, std::nullopt);
  }
  return {grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("bottleneck_adapter", PEFT_EXT_CUDA_BOX(&peft_ext::bottleneck_adapter_cuda));
  m.impl("bottleneck_adapter_backward", PEFT_EXT_CUDA_BOX(&peft_ext::bottleneck_adapter_backward_cuda));
}
