// The bottleneck adapter on the CPU:
//
//   U = x Dᵀ + b_d [T, M];   H = act(U);   Y = residual + s (H Vᵀ + b_v) [T, N]
//
// For more than two tokens with x, D and V in one 16-bit dtype that multiplies_in (linear/cpu/base_product.h) accepts,
// PyTorch's matrix products compute the forward and the gradients. For up to eight tokens, PyTorch's matrix products
// compute the gradients in every dtype. Where PyTorch's matrix products are not used, the kernels of linear/cpu compute
// the products. The forward of these kernels is one pass over x for U, and one pass that reads the residual and writes
// Y; for up to kUnpackedTokens tokens D and V are not packed. The backward of these kernels is one or two passes over
// dY for P = s dY V (the gradient of H), dV and db_v, one pass over x for dD, and one pass that reads dY and writes dX
// = dY + dU D (if the residual is not x, dX is dU D). U, H, P and dU are float32. PyTorch's operators compute erf,
// tanh, exp, SiLU and ReLU.
#include <algorithm>
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "bottleneck/checked_activation.h"
#include "linear/cpu/passes.h"
#include "linear/cpu/base_product.h"

namespace peft_ext {
namespace {

struct Bottleneck {
  int64_t tokens, in, out, size;
};

Bottleneck checked_sizes(const char* op, const Tensor& x, const Tensor& down, const Tensor& up) {
  STD_TORCH_CHECK(x.dim() >= 1 && down.dim() == 2 && up.dim() == 2 && down.size(1) == x.size(x.dim() - 1) &&
                      up.size(1) == down.size(0),
                  op, ": down_weight and up_weight are not [M, K] and [N, M] for x [..., K]");
  STD_TORCH_CHECK(down.numel() > 0 && up.numel() > 0, op,
                  ": down_weight or up_weight has no elements, wanted at least one row and column");
  return {rows_of(x), down.size(1), up.size(0), down.size(0)};
}

Tensor flat(const Tensor& m) { return as_shape(as_contiguous(m), {rows_of(m), m.size(m.dim() - 1)}); }

Tensor dispatched(const char* name, std::vector<StableIValue> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

StableIValue value(const Tensor& tensor) { return torch::stable::detail::from(tensor); }

constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f, kCubic = 0.044715f;
constexpr float kDensity = 0.39894228040143268f;  // 1 / √(2π)
constexpr int64_t kElementGrain = 32 * 1024;

// Returns a float32 tensor of u's shape [T, M] with the value f(i) at each flat index i.
template <typename F>
Tensor elementwise(const Tensor& u, const F& f) {
  Tensor out = empty({u.size(0), u.size(1)}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, u.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = f(i);
  });
  return out;
}

// Returns the curve c of GELU(u) = u/2 (1 + c): erf(u / √2), or, for the tanh form of GELU, tanh(√(2/π) (u + 0.044715
// u³)). PyTorch's own GELU is not called, because the stable ABI would leak its string argument `approximate` (see
// common/activation.h).
Tensor gelu_curve(const Tensor& u, Activation activation) {
  const float* at = u.const_data_ptr<float>();
  if (activation == Activation::kGelu)
    return dispatched("aten::erf", {value(elementwise(u, [at](int64_t i) { return at[i] * kSqrtHalf; }))});
  return dispatched(
      "aten::tanh",
      {value(elementwise(u, [at](int64_t i) { return kSqrtTwoOverPi * (at[i] + kCubic * at[i] * at[i] * at[i]); }))});
}

bool is_gelu(Activation activation) { return activation == Activation::kGelu || activation == Activation::kGeluTanh; }

// Returns act(u). For GELU, `curve` is gelu_curve(u); the other activations do not read `curve`.
Tensor activated(const Tensor& u, Activation activation, const Tensor& curve) {
  if (activation == Activation::kRelu) return dispatched("aten::relu", {value(u)});
  if (activation == Activation::kSilu) return dispatched("aten::silu", {value(u)});
  const float *at = u.const_data_ptr<float>(), *c = curve.const_data_ptr<float>();
  return elementwise(u, [=](int64_t i) { return 0.5f * at[i] * (1.0f + c[i]); });
}

Tensor activation_backward(const Tensor& grad, const Tensor& u, Activation activation, const Tensor& curve) {
  if (activation == Activation::kSilu) return dispatched("aten::silu_backward", {value(grad), value(u)});
  const float *g = grad.const_data_ptr<float>(), *at = u.const_data_ptr<float>();
  if (activation == Activation::kRelu) return elementwise(u, [=](int64_t i) { return at[i] > 0.0f ? g[i] : 0.0f; });
  const float* c = curve.const_data_ptr<float>();
  if (activation == Activation::kGeluTanh)
    return elementwise(u, [=](int64_t i) {
      const float inner = kSqrtTwoOverPi * (1.0f + 3.0f * kCubic * at[i] * at[i]);
      return g[i] * (0.5f * (1.0f + c[i]) + 0.5f * at[i] * (1.0f - c[i] * c[i]) * inner);
    });
  const Tensor bell =
      dispatched("aten::exp", {value(elementwise(u, [=](int64_t i) { return -0.5f * at[i] * at[i]; }))});
  const float* e = bell.const_data_ptr<float>();
  return elementwise(u, [=](int64_t i) { return g[i] * (0.5f * (1.0f + c[i]) + at[i] * e[i] * kDensity); });
}

// Returns the dtype of products that read D and V without packing, or nullopt if D and V are packed. For more than
// kFewer tokens, the dtype is the common 16-bit dtype of x, D and V if multiplies_in accepts that dtype. Otherwise the
// dtype is float32 for up to `few` tokens, for which packing would take most of the time.
std::optional<ScalarType> product_type(const Tensor& x, const Tensor& down, const Tensor& up, int64_t few) {
  // Up to kFewer tokens are multiplied in float32, because converting a row of D to float32 takes only as long as
  // multiplying the row with one token.
  constexpr int64_t kFewer = 2;
  const ScalarType type = x.scalar_type();
  const bool same = type != ScalarType::Float && down.scalar_type() == type && up.scalar_type() == type;
  if (same && multiplies_in(type, true) && rows_of(x) > kFewer) return type;
  if (rows_of(x) <= few) return ScalarType::Float;
  return std::nullopt;
}

// Returns the arguments of an expand pass that adds to `residual` and writes y. The caller sets the fields for the
// added terms, such as left, right, bias and before. An empty residual stands for zeros.
Expand onto_residual(const Tensor& y, const Tensor& residual) {
  Expand work;
  work.y = y.mutable_data_ptr();
  work.dtype = dtype_of("bottleneck_adapter", "x", y);
  work.columns = y.size(y.dim() - 1);
  work.rank = 0;
  work.stride = round_up(work.columns, kColumnStep);
  work.residual = residual.numel() == 0 ? nullptr : residual.const_data_ptr();
  return work;
}

void fill(const Tensor& tensor, float value) { std::fill_n(tensor.mutable_data_ptr<float>(), tensor.numel(), value); }

void scale_by(const Tensor& tensor, float factor) {
  float* data = tensor.mutable_data_ptr<float>();
  parallel_for(0, tensor.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) data[i] *= factor;
  });
}

// Adds bias [M] to each row of u [T, M].
void add_rows(const Tensor& u, const Tensor& bias) {
  const int64_t size = u.size(1);
  const float* add = bias.const_data_ptr<float>();
  float* data = u.mutable_data_ptr<float>();
  parallel_for(0, u.size(0), ceil_div(kElementGrain, size), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t m = 0; m < size; ++m) data[t * size + m] += add[m];
  });
}

// Returns the sums [M] of m [T, M] over the rows. The sums are computed in double, because T may be large, and are then
// rounded to float32.
Tensor sum_of_rows(const Tensor& m) {
  constexpr int64_t kColumns = 16;
  const int64_t tokens = m.size(0), size = m.size(1);
  Tensor out = empty({size}, ScalarType::Float);
  const float* from = m.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t grain = ceil_div(kElementGrain, kColumns * std::max<int64_t>(1, tokens));
  parallel_for(0, ceil_div(size, kColumns), grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumns; first < min_i64(end * kColumns, size); first += kColumns) {
      const int64_t count = min_i64(kColumns, size - first);
      double sums[kColumns] = {};
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < count; ++i) sums[i] += from[t * size + first + i];
      for (int64_t i = 0; i < count; ++i) to[first + i] = static_cast<float>(sums[i]);
    }
  });
  return out;
}

// Largest number of tokens for which the forward computes float32 products without packing D and V. The products read D
// and V once for each kFewTokens tokens.
constexpr int64_t kUnpackedTokens = 3 * kFewTokens;

// Computes out [T, N] float32 = m [T, K] wᵀ for w [N, K] without packing.
void times_weight(const char* op, const Tensor& m, const Tensor& w, const Tensor& out) {
  const Tensor held = as_contiguous(w);
  Tensor left = as_type(m, ScalarType::Float), to = out;
  for (int64_t t = 0; t < rows_of(m); t += kFewTokens) {
    const int64_t count = min_i64(kFewTokens, rows_of(m) - t);
    run_few_tokens(op, held, torch::stable::narrow(left, 0, t, count), torch::stable::narrow(to, 0, t, count), false);
  }
}

void shrink(const char* op, const Tensor& x, const Tensor& down, const Bottleneck& size, Tensor& u) {
  const Tensor right = packed(op, "down_weight", down, nullptr, nullptr, false, size.size, size.in);
  RowPass pass = make_row_pass(x, dtype_of(op, "x", x), size.in, size.size, Dropout());
  pass.right = right.const_data_ptr<float>();
  pass.out = u.mutable_data_ptr<float>();
  run_row_pass(pass, size.tokens);
}

std::tuple<Tensor, Tensor> bottleneck_adapter_cpu(Tensor x, std::optional<Tensor> residual, Tensor down_weight,
                                                  std::optional<Tensor> down_bias, Tensor up_weight,
                                                  std::optional<Tensor> up_bias, double scale, int64_t activation) {
  constexpr const char* kOp = "bottleneck_adapter";
  const Bottleneck size = checked_sizes(kOp, x, down_weight, up_weight);
  const Tensor held = flat(x), onto = residual.has_value() ? flat(*residual) : held;
  STD_TORCH_CHECK(onto.size(0) == size.tokens && onto.size(1) == size.out && onto.scalar_type() == x.scalar_type(), kOp,
                  ": residual is not [..., ", size.out, "] of x's type");
  Tensor y = empty(with_last(x, size.out), x.scalar_type());
  Tensor u = empty({size.tokens, size.size}, ScalarType::Float);
  if (size.tokens == 0) return {y, u};

  const std::optional<ScalarType> products = product_type(x, down_weight, up_weight, kUnpackedTokens);
  const float factor = static_cast<float>(scale);
  // Computes U. PyTorch's product in a 16-bit dtype adds a bias of the same dtype before rounding, as PyTorch's linear
  // layer does.
  bool biased = !down_bias.has_value();
  if (products == ScalarType::Float) {
    times_weight(kOp, held, down_weight, u);
  } else if (products.has_value()) {
    Tensor rounded = empty({size.tokens, size.size}, *products);
    if (!biased && down_bias->scalar_type() == *products) {
      torch::stable::copy_(rounded, as_shape(as_contiguous(*down_bias), {1, size.size}));
      addmm_(rounded, held, transposed(down_weight), 1.0);
      biased = true;
    } else {
      mm_out(rounded, held, transposed(down_weight));
    }
    torch::stable::copy_(u, rounded);
  } else {
    shrink(kOp, held, down_weight, size, u);
  }
  if (!biased) add_rows(u, float_vector(kOp, "down_bias", *down_bias, size.size));

  const Activation kind = checked_activation(kOp, activation);
  const Tensor h = activated(u, kind, is_gelu(kind) ? gelu_curve(u, kind) : u);
  const int64_t stride = round_up(size.out, kColumnStep);
  Expand work = onto_residual(y, onto);
  Tensor bias, right, sums;
  if (up_bias.has_value()) {
    STD_TORCH_CHECK(up_bias->numel() == size.out, kOp, ": up_bias has ", up_bias->numel(), " elements, wanted ",
                    size.out);
    const Tensor row = as_shape(as_contiguous(*up_bias), {1, size.out});
    bias = packed(kOp, "up_bias", row, &factor, nullptr, false, 1, stride);
    work.bias = bias.const_data_ptr<float>();
  }
  scale_by(h, factor);
  if (!products.has_value()) {
    sums = as_contiguous(h);
    right = packed(kOp, "up_weight", up_weight, nullptr, nullptr, true, size.size, stride);
    work.rank = size.size;
    work.left = sums.const_data_ptr<float>();
    work.right = right.const_data_ptr<float>();
    run_expand(work, size.tokens);
  } else if (*products == ScalarType::Float) {
    sums = empty({size.tokens, size.out}, ScalarType::Float);
    times_weight(kOp, h, up_weight, sums);
    work.before = sums.const_data_ptr<float>();
    run_expand(work, size.tokens);
  } else {
    run_expand(work, size.tokens);
    addmm_(as_shape(y, {size.tokens, size.out}), as_type(h, *products), transposed(up_weight), 1.0);
  }
  return {y, u};
}

// The gradients dV and db_v of the up projection, and P = s dY V, [T, M] float32.
struct UpGradients {
  Tensor weight, bias, p;
};

UpGradients up_gradients_by_products(const Tensor& grad, const Tensor& h, const Tensor& up, const Bottleneck& size,
                                     float scale) {
  const ScalarType type = grad.scalar_type();
  UpGradients out{empty({size.out, size.size}, type), empty({1, size.out}, type),
                  empty({size.tokens, size.size}, type)};
  mm_out(out.p, grad, as_type(up, type));
  out.p = as_type(out.p, ScalarType::Float);
  scale_by(out.p, scale);
  scale_by(h, scale);
  mm_out(out.weight, transposed(grad), as_type(h, type));
  out.weight = as_type(out.weight, up.scalar_type());
  const Tensor ones = empty({1, size.tokens}, ScalarType::Float);
  fill(ones, 1.0f);
  mm_out(out.bias, as_type(ones, type), grad);
  out.bias = as_shape(as_type(out.bias, ScalarType::Float), {size.out});
  scale_by(out.bias, scale);
  return out;
}

UpGradients up_gradients(const char* op, const Tensor& grad, const Tensor& h, const Tensor& up, const Bottleneck& size,
                         float scale) {
  const Tensor right = packed(op, "up_weight", up, nullptr, nullptr, true, size.size, size.out);
  const Tensor left = as_contiguous(h);
  UpGradients out;
  out.p = empty({size.tokens, size.size}, ScalarType::Float);
  RowPass pass = make_row_pass(grad, dtype_of(op, "grad", grad), size.out, size.size, Dropout());
  pass.right = right.const_data_ptr<float>();
  pass.out = out.p.mutable_data_ptr<float>();
  pass.left = left.const_data_ptr<float>();
  const Tensor sums = run_outer_pass(pass, size.tokens, &out.bias);
  scale_by(out.bias, scale);
  out.weight = unpacked(op, "up_weight", sums, scale, nullptr, nullptr, true, up);
  scale_by(out.p, scale);
  return out;
}

Tensor down_gradient(const char* op, const Tensor& grad_u, const Tensor& x, const Tensor& down,
                     const Bottleneck& size) {
  const Tensor left = as_contiguous(grad_u);
  RowPass pass = make_row_pass(x, dtype_of(op, "x", x), size.in, size.size, Dropout());
  pass.left = left.const_data_ptr<float>();
  return unpacked(op, "down_weight", run_outer_pass(pass, size.tokens), 1.0f, nullptr, nullptr, false, down);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward_cpu(Tensor grad, Tensor x, Tensor u,
                                                                                   Tensor down_weight, Tensor up_weight,
                                                                                   double scale, int64_t activation,
                                                                                   bool own, bool needs_grad_x) {
  constexpr const char* kOp = "bottleneck_adapter_backward";
  const Bottleneck size = checked_sizes(kOp, x, down_weight, up_weight);
  Tensor flat_grad = flat(grad), flat_x = flat(x);
  const Tensor flat_u = as_contiguous(u);
  STD_TORCH_CHECK(
      flat_grad.size(0) == size.tokens && flat_grad.size(1) == size.out && grad.scalar_type() == x.scalar_type(), kOp,
      ": grad is not [..., ", size.out, "] of x's type");
  STD_TORCH_CHECK(!own || size.in == size.out, kOp, ": x is the residual, and up_weight has ", size.out,
                  " rows, wanted ", size.in);
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float && u.numel() == size.tokens * size.size, kOp, ": u has ",
                  u.numel(), " elements, wanted ", size.tokens * size.size);
  const ScalarType type = x.scalar_type();
  const std::optional<ScalarType> products = product_type(x, down_weight, up_weight, kFewTokens);
  if (products.has_value()) {
    flat_grad = as_type(flat_grad, *products);
    flat_x = as_type(flat_x, *products);
  }
  const float factor = static_cast<float>(scale);

  const Activation kind = checked_activation(kOp, activation);
  const Tensor curve = is_gelu(kind) ? gelu_curve(flat_u, kind) : flat_u;
  const Tensor h = activated(flat_u, kind, curve);
  const UpGradients over_grad = products.has_value() ? up_gradients_by_products(flat_grad, h, up_weight, size, factor)
                                                     : up_gradients(kOp, flat_grad, h, up_weight, size, factor);
  const Tensor grad_u = activation_backward(over_grad.p, flat_u, kind, curve);
  const Tensor grad_down_bias = sum_of_rows(grad_u);

  Tensor grad_down, rounded;
  if (products.has_value()) {
    rounded = as_type(grad_u, *products);
    grad_down = empty({size.size, size.in}, *products);
    mm_out(grad_down, transposed(rounded), flat_x);
    grad_down = as_type(grad_down, down_weight.scalar_type());
  } else {
    grad_down = down_gradient(kOp, grad_u, flat_x, down_weight, size);
  }
  Tensor grad_x = empty({0}, type);
  if (!needs_grad_x) return {grad_x, grad_down, grad_down_bias, over_grad.weight, over_grad.bias};
  if (products.has_value()) {
    const Tensor down = as_type(down_weight, *products);
    Tensor sum = empty({size.tokens, size.in}, *products);
    if (own) torch::stable::copy_(sum, flat_grad);
    own ? addmm_(sum, rounded, down, 1.0) : mm_out(sum, rounded, down);
    return {as_shape(as_type(sum, type), {x.sizes().begin(), x.sizes().end()}), grad_down, grad_down_bias,
            over_grad.weight, over_grad.bias};
  }
  grad_x = empty({x.sizes().begin(), x.sizes().end()}, type);
  const Tensor left = as_contiguous(grad_u);
  const Tensor right =
      packed(kOp, "down_weight", down_weight, nullptr, nullptr, false, size.size, round_up(size.in, kColumnStep));
  Expand work = onto_residual(grad_x, own ? flat_grad : none(type));
  work.rank = size.size;
  work.left = left.const_data_ptr<float>();
  work.right = right.const_data_ptr<float>();
  run_expand(work, size.tokens);
  return {grad_x, grad_down, grad_down_bias, over_grad.weight, over_grad.bias};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("bottleneck_adapter", PEFT_EXT_CPU_BOX(&peft_ext::bottleneck_adapter_cpu));
  m.impl("bottleneck_adapter_backward", PEFT_EXT_CPU_BOX(&peft_ext::bottleneck_adapter_backward_cpu));
}
