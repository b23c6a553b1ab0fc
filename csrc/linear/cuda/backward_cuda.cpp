// Computes the backward of the adapted layer, whose formula is in adapted_linear.cuh. The steps are:
//
//   One pass over dY, or two passes for more than 32 ranks, compute P = dY (ρB) and dB = dYᵀ (S ∘ ρ).
//   One pass over x computes dA = x̃ᵀ P.
//   One write of dX computes dX₀ = mask ∘ (P A).
//   PyTorch's matrix product adds dY W in place, which gives dX = dX₀ + dY W.
//
// P also contains dropout's factor 1/(1-p), unless dropout also acts on the base product (drop_base). With an output
// scale g, these formulas have g ∘ dY in place of dY. With dropout on the base (PEFT's DoRA), dX needs two products
// with W: the product of (g - 1) ∘ dY, to which the mask is applied, and the product of dY. If in_scale (IA3's vector
// for the input) is given, one more pass over dX multiplies dX by in_scale and computes the gradient of in_scale.
#include "linear/cuda/call.cuh"

namespace peft_ext {
void check_grad(const char* op, const Tensor& grad, const Tensor& x, const DeviceSizes& size) {
  check_same_device(op, "grad", grad, x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim() && device_rows(grad) == size.tokens &&
                      grad.size(grad.dim() - 1) == size.outputs,
                  op, ": grad is ", torch::headeronly::toString(grad.scalar_type()), " with ", grad.numel(),
                  " elements, wanted ", torch::headeronly::toString(x.scalar_type()), " with ",
                  size.tokens * size.outputs);
}

namespace {

// Returns an uninitialized tensor for x's gradient; the tensor has shape [0] if needs_grad_x is false.
Tensor empty_grad_x(const Tensor& x, bool needs_grad_x) {
  return needs_grad_x ? device_empty_like(x) : device_empty(x, {0}, x.scalar_type());
}

// Sets grad_A and grad_B to zeros if the layer has lora_A and lora_B, for a call whose x has no tokens.
void no_tokens(const Tensor& x, const DeviceAdapter& adapter, const DeviceSizes& size, DeviceBackward* out) {
  if (size.rank == 0) return;
  out->grad_A = device_zeros(x, {size.rank, size.inputs}, adapter.lora_A->scalar_type());
  out->grad_B = device_zeros(x, {size.outputs, size.rank}, adapter.lora_B->scalar_type());
}

}  // namespace

DeviceBackward adapted_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceWeight& weight,
                                const DeviceAdapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x,
                                const std::optional<Tensor>& z) {
  const DeviceSizes size = checked_sizes(op, x, weight, adapter);
  check_grad(op, grad, x, size);
  if (size.rank > 0) check_tensor(op, "s", *s, ScalarType::Float, size.tokens * size.rank, x);
  if (z.has_value()) check_tensor(op, "z", *z, x.scalar_type(), size.tokens * size.outputs, x);
  DeviceBackward out;
  const bool low_rank = size.rank > 0, drop_base = adapter.drop_base && adapter.seed.has_value();
  // If x has no tokens, the gradients of rank_scale, in_scale and out_scale are zeros.
  const auto sums = [&](bool wanted, int64_t count) {
    return size.tokens == 0 && wanted ? device_zeros(x, {count}, ScalarType::Float)
                                      : device_empty(x, {0}, ScalarType::Float);
  };
  out.grad_rank_scale = sums(adapter.rank_scale.has_value(), size.rank);
  out.grad_in_scale = sums(adapter.in_scale.has_value(), size.inputs);
  out.grad_out_scale = sums(z.has_value(), size.outputs);
  // If dropout acts on the base, `dropped` allocates dX later.
  out.grad_x = empty_grad_x(x, needs_grad_x && !(drop_base && size.tokens > 0));
  if (size.tokens == 0) {
    no_tokens(x, adapter, size, &out);
    return out;
  }
  const Tensor flat_grad = flat_rows(grad), flat_x = flat_rows(x);

  RankGradients grads;
  std::optional<Tensor> other;
  if (z.has_value()) other = as_contiguous(*z);
  if (low_rank)
    grads = rank_gradients(x, flat_x, {{flat_grad, &adapter, size, *s, other.has_value() ? &*other : nullptr, &out}},
                           needs_grad_x)[0];
  // If grad_out_scale is not empty, rank_gradients has already computed grad_out_scale from z.
  if (out.grad_out_scale.numel() > 0) other = std::nullopt;

  // If out_scale is given, dX has the product G W with G = g ∘ dY, or with G = (g - 1) ∘ dY if drop_base is true. If
  // `folds` is true, the product is dY (g ∘ W). The pass over dY that computes G also computes the sums of dg, the
  // gradient of g, unless rank_gradients has computed dg.
  const bool product = needs_grad_x || adapter.in_scale.has_value();
  const bool folds =
      product && adapter.out_scale.has_value() && !drop_base && folds_scale(weight, x.scalar_type(), size.tokens);
  Tensor scaled = flat_grad;
  if (adapter.out_scale.has_value() && ((product && !folds) || other.has_value())) {
    const ColumnPartials found = column_partials(flat_grad, product && !folds ? adapter.out_scale : std::nullopt,
                                                 drop_base ? -1.0f : 0.0f, other);
    if (product && !folds) scaled = found.scaled;
    if (other.has_value()) out.grad_out_scale = reduced_columns(found.partial);
  }
  if (!product) return out;

  const Tensor w =
      folds ? scaled_weight(weight, x.scalar_type(), *adapter.out_scale) : dense_weight(weight, x.scalar_type());
  if (drop_base) {
    const Tensor through = device_empty_like(flat_x), direct = device_empty_like(flat_x);
    if (low_rank) {
      expand(through, &grads.p, &grads.a, nullptr, std::nullopt);
      addmm_(through, scaled, w, 1.0);
    } else {
      mm_out(through, scaled, w);
    }
    mm_out(direct, flat_grad, w);
    out.grad_x = as_shape(dropped(through, adapter, direct), {x.sizes().begin(), x.sizes().end()});
    return out;
  }
  Tensor grad_x = needs_grad_x ? as_shape(out.grad_x, {size.tokens, size.inputs})
                               : device_empty(x, {size.tokens, size.inputs}, x.scalar_type());
  if (low_rank) {
    expand_dropped(grad_x, grads.p, grads.a, adapter, grads.kept);
    addmm_(grad_x, scaled, w, 1.0);
  } else {
    mm_out(grad_x, scaled, w);
  }
  if (adapter.in_scale.has_value()) {
    const ColumnPartials found = column_partials(grad_x, adapter.in_scale, 0.0f, flat_x);
    out.grad_in_scale = reduced_columns(found.partial);
    if (needs_grad_x) out.grad_x = as_shape(found.scaled, {x.sizes().begin(), x.sizes().end()});
  }
  return out;
}

DeviceSiblingsBackward adapted_backwards(const char* op, const std::vector<std::optional<Tensor>>& grads,
                                         const Tensor& x, const std::vector<DeviceLayer>& layers,
                                         const std::vector<Tensor>& s, bool needs_grad_x) {
  STD_TORCH_CHECK(grads.size() == layers.size() && s.size() == layers.size(), op, ": ", grads.size(), " gradients and ",
                  s.size(), " S of ", layers.size(), " layers");
  DeviceSiblingsBackward out;
  out.grad_x = empty_grad_x(x, needs_grad_x);
  out.layers.resize(layers.size());
  std::vector<DeviceRankCall> calls;
  for (size_t i = 0; i < layers.size(); ++i) {
    const DeviceAdapter& adapter = layers[i].adapter;
    DeviceBackward& own = out.layers[i];
    own.grad_A = own.grad_B = own.grad_rank_scale = device_empty(x, {0}, ScalarType::Float);
    if (!grads[i].has_value()) continue;
    const DeviceSizes size = checked_sizes(op, x, layers[i].weight, adapter);
    check_grad(op, *grads[i], x, size);
    if (size.rank > 0) check_tensor(op, "s", s[i], ScalarType::Float, size.tokens * size.rank, x);
    if (size.tokens == 0) {
      no_tokens(x, adapter, size, &own);
      if (adapter.rank_scale.has_value()) own.grad_rank_scale = device_zeros(x, {size.rank}, ScalarType::Float);
    } else if (size.rank > 0) {
      calls.push_back({flat_rows(*grads[i]), &adapter, size, s[i], nullptr, &own});
    }
  }
  std::vector<RankGradients> found;
  if (!calls.empty()) found = rank_gradients(x, flat_rows(x), calls, needs_grad_x);
  if (out.grad_x.numel() == 0) return out;
  const Tensor grad_x = as_shape(out.grad_x, {device_rows(x), x.size(x.dim() - 1)});
  std::vector<DroppedProduct> terms;
  for (size_t i = 0; i < calls.size(); ++i)
    terms.push_back({&found[i].p, &found[i].a, calls[i].adapter, &found[i].kept});
  bool written = !terms.empty();
  if (written) expand_dropped(grad_x, terms);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (!grads[i].has_value()) continue;
    const Tensor grad = flat_rows(*grads[i]), w = dense_weight(layers[i].weight, x.scalar_type());
    written ? addmm_(grad_x, grad, w, 1.0) : mm_out(grad_x, grad, w);
    written = true;
  }
  if (!written) torch::stable::fill_(out.grad_x, 0.0);
  return out;
}

Tensor frozen_backward(const char* op, const Tensor& grad, const DeviceWeight& weight) {
  check_same_device(op, "grad", grad, weight.weight, "weight");
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == weight.outputs, op, ": grad has ",
                  grad.dim() >= 1 ? grad.size(grad.dim() - 1) : 0, " columns, wanted ", weight.outputs);
  const Tensor out = device_empty(grad, shape_with_last(grad, weight.inputs), grad.scalar_type());
  if (out.numel() == 0) return out;
  mm_out(as_shape(out, {device_rows(grad), weight.inputs}), flat_rows(grad), dense_weight(weight, grad.scalar_type()));
  return out;
}

ColumnProducts scale_columns(const Tensor& m, const std::optional<Tensor>& scale, const std::optional<Tensor>& other) {
  const int64_t columns = m.size(m.dim() - 1);
  ColumnProducts out;
  out.scaled = device_empty(m, {0}, m.scalar_type());
  out.sums = device_zeros(m, {other.has_value() ? columns : 0}, ScalarType::Float);
  const std::vector<int64_t> shape(m.sizes().begin(), m.sizes().end());
  if (m.numel() == 0) {
    if (scale.has_value()) out.scaled = device_empty(m, shape, m.scalar_type());
    return out;
  }
  const std::optional<Tensor> flat_other = other.has_value() ? std::optional<Tensor>(flat_rows(*other)) : std::nullopt;
  const ColumnPartials found = column_partials(flat_rows(m), scale, 0.0f, flat_other);
  if (scale.has_value()) out.scaled = as_shape(found.scaled, shape);
  if (other.has_value()) out.sums = reduced_columns(found.partial);
  return out;
}

}  // namespace peft_ext
