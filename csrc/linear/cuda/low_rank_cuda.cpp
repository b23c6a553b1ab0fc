// Computes the low-rank term (S ∘ ρ) Bᵀ and the gradients of this term, as a part of the adapted layer, and alone for
// the operator lora_residual. The factors ρ [R] are scaling times rank_scale (ones if rank_scale is missing).
#include "linear/cuda/call.cuh"
#include "linear/cuda/rank_scale.cuh"

namespace peft_ext {

DeviceAdapter lora_device_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                                  const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                                  const std::optional<Tensor>& seed) {
  DeviceAdapter adapter;
  adapter.lora_A = lora_A;
  adapter.lora_B = lora_B;
  if (rank_scale.has_value()) adapter.rank_scale = device_vector(op, "rank_scale", *rank_scale, lora_A.size(0), lora_A);
  adapter.scaling = scaling;
  adapter.dropout_p = dropout_p;
  adapter.seed = device_seed(op, dropout_p, seed, lora_A);
  return adapter;
}

DeviceSizes checked_sizes(const char* op, const Tensor& x, const DeviceWeight& weight, const DeviceAdapter& adapter) {
  check_same_device(op, "x", x, weight.weight, "weight");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.inputs, op, ": x has ",
                  x.dim() >= 1 ? x.size(x.dim() - 1) : 0, " columns, wanted ", weight.inputs);
  DeviceSizes size{device_rows(x), weight.inputs, weight.outputs, 0, 0};
  if (!adapter.lora_A.has_value()) return size;
  const Tensor &a = *adapter.lora_A, &b = *adapter.lora_B;
  check_matrix(op, "lora_A", a, x);
  check_matrix(op, "lora_B", b, x);
  STD_TORCH_CHECK(a.dim() == 2 && a.size(1) == weight.inputs, op, ": lora_A has ", a.numel(), " elements, wanted [R, ",
                  weight.inputs, "]");
  STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == weight.outputs && b.size(1) == a.size(0), op, ": lora_B is not [",
                  weight.outputs, ", ", a.size(0), "]");
  size.rank = a.size(0);
  size.padded = padded_rank(size.rank);
  return size;
}

Reduced shrunk_results(const DeviceAdapter& adapter, const Tensor& s, const HeldTerms* terms) {
  Reduced wanted;
  wanted.scale = adapter.seed.has_value() ? 1.0 / (1.0 - adapter.dropout_p) : 1.0;
  wanted.rank_scale = adapter.rank_scale.has_value() ? &*adapter.rank_scale : nullptr;
  wanted.after = adapter.scaling;
  wanted.plain = &s;
  wanted.terms = terms;
  return wanted;
}

void shrink(const Tensor& x, const DeviceAdapter& adapter, const DeviceSizes& size, const HeldTerms& a, const Tensor& s,
            const HeldTerms* terms) {
  reduce(rank_pass(dense_input(x, &adapter), &a, nullptr).rows, size.rank, shrunk_results(adapter, s, terms));
}

namespace {

// Operands and results that grad_B_of holds for one layer.
struct RankWorkOf {
  Tensor a, b, s, products, dots;
  HeldTerms right, left;
  PassSums sums;
};

// Returns dropout's factor 1/(1-p), or 1 without dropout.
double divided(const DeviceAdapter& adapter) {
  return adapter.seed.has_value() ? 1.0 / (1.0 - adapter.dropout_p) : 1.0;
}

const Tensor* given(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// Computes grad_A = Pᵀ x̃ of each layer; Pᵀ is given as bfloat16 terms (terms.cuh). If needs_grad_x is true and x can
// be read in vectors of 16 bytes, the rank passes also store the bits of the dropout masks, for expand_dropped.
void grad_A_of(const Tensor& flat_x, const std::vector<DeviceRankCall>& calls, bool needs_grad_x,
               std::vector<RankGradients>* grads) {
  std::vector<int64_t> kinds;
  for (const DeviceRankCall& call : calls) kinds.push_back(call.size.padded);
  std::vector<PartialSums> sums(calls.size());
  const bool together = siblings_read(flat_x);
  for (const std::vector<size_t>& group : sibling_groups(kinds)) {
    if (group.size() > 1 && together) {
      std::vector<SiblingTerm> terms;
      for (size_t i : group) terms.push_back({&(*grads)[i].p_transposed, calls[i].adapter});
      const SiblingSums found = siblings_pass(flat_x, terms, true, needs_grad_x);
      for (size_t j = 0; j < group.size(); ++j) {
        sums[group[j]] = found.sums[j];
        (*grads)[group[j]].kept = found.kept[j];
      }
      continue;
    }
    for (size_t i : group) {
      PassWants mask;
      mask.mask = needs_grad_x;
      const PassSums over_x =
          rank_pass(dense_input(flat_x, calls[i].adapter), nullptr, &(*grads)[i].p_transposed, mask);
      sums[i] = over_x.columns;
      (*grads)[i].kept = over_x.kept;
    }
  }
  Reducer reducer(flat_x);
  for (size_t i = 0; i < calls.size(); ++i) reducer.add(sums[i], calls[i].size.rank, grad_A_results(calls[i]));
  reducer.run();
}

}  // namespace

Reduced grad_A_results(const DeviceRankCall& call) {
  const Tensor& a = *call.adapter->lora_A;
  call.out->grad_A = device_empty(a, {call.size.rank, call.size.inputs}, a.scalar_type());
  Reduced grad_a;
  grad_a.scale = call.adapter->drop_base ? divided(*call.adapter) : 1.0;
  grad_a.out = &call.out->grad_A;
  grad_a.row_stride = 1;
  grad_a.rank_stride = call.size.inputs;
  return grad_a;
}

std::vector<RankGradients> grad_B_of(const Tensor& x, const std::vector<DeviceRankCall>& calls, bool needs_grad_x) {
  const ScalarType type = x.scalar_type();
  std::vector<RankGradients> grads(calls.size());
  std::vector<RankWorkOf> work(calls.size());
  Splitter splitter(x, type);
  for (size_t i = 0; i < calls.size(); ++i) {
    const DeviceRankCall& call = calls[i];
    work[i].a = matrix(call.adapter->lora_A), work[i].b = matrix(call.adapter->lora_B);
    work[i].s = as_contiguous(call.s);
    work[i].right = splitter.right_of_pass(work[i].b, true, given(call.adapter->out_scale));
    work[i].left = splitter.left_of_pass(work[i].s, true);
    if (needs_grad_x) grads[i].a = splitter.right_of_expand(work[i].a, true);
  }
  splitter.run();

  Reducer reducer(x);
  for (size_t i = 0; i < calls.size(); ++i) {
    const DeviceRankCall& call = calls[i];
    const DeviceAdapter& adapter = *call.adapter;
    const DeviceSizes& size = call.size;
    PassWants dots;
    dots.beside = call.z;
    work[i].sums = rank_pass(dense_input(call.grad), &work[i].right, &work[i].left, dots);
    if (work[i].sums.dots.has_value()) {
      // The sums are computed only if dY has a multiple of eight columns, so that the columns divide into pairs.
      call.out->grad_out_scale = device_empty(x, {size.outputs}, ScalarType::Float);
      work[i].dots = as_shape(call.out->grad_out_scale, {size.outputs / 2, 2});
      Reduced grad_g;
      grad_g.plain = &work[i].dots;
      reducer.add({*work[i].sums.dots, work[i].sums.dots->size(0), work[i].sums.dots->size(1), size.outputs / 2}, 2,
                  grad_g);
    }

    grads[i].p_transposed = pass_terms(x, size.padded, size.tokens);
    Reduced p;
    p.rank_scale = given(adapter.rank_scale);
    // P = (g ∘ dY) (ρB) contains dropout's factor 1/(1-p), which dA and dX both need. If drop_base is true, P does not
    // contain the factor: dropout also acts on the gradient through the base layer, so that the factor is applied
    // later, to the sum of the two gradients and to dA.
    p.after = adapter.drop_base ? adapter.scaling : adapter.scaling * divided(adapter);
    p.transposed = &grads[i].p_transposed;
    if (needs_grad_x) {
      grads[i].p = left_terms(x, size.tokens, size.padded, type);
      p.terms = &grads[i].p;
    }
    call.out->grad_B = device_empty(x, {size.outputs, size.rank}, work[i].b.scalar_type());
    Reduced grad_b;
    grad_b.row_scale = given(adapter.out_scale);
    grad_b.rank_scale = p.rank_scale;
    grad_b.after = adapter.scaling;
    grad_b.out = &call.out->grad_B;
    grad_b.row_stride = size.rank;
    grad_b.rank_stride = 1;
    if (p.rank_scale != nullptr) {
      work[i].products = device_empty(x, {size.outputs, size.rank}, ScalarType::Float);
      grad_b.plain = &work[i].products;
    }
    reducer.add(work[i].sums.rows, size.rank, p);
    reducer.add(work[i].sums.columns, size.rank, grad_b);
  }
  reducer.run();
  for (size_t i = 0; i < calls.size(); ++i) {
    work[i].sums = PassSums();
    if (!calls[i].adapter->rank_scale.has_value()) continue;
    const DeviceSizes& size = calls[i].size;
    const Tensor wide = as_type(work[i].b, ScalarType::Float);
    calls[i].out->grad_rank_scale = device_empty(x, {size.rank}, ScalarType::Float);
    Launcher launcher(wide);
    launcher(rank_scale_kernel, size.rank, kColumnThreads, launcher.in<float>(wide),
             launcher.in<float>(work[i].products), size.outputs, size.rank,
             static_cast<float>(calls[i].adapter->scaling), launcher.out<float>(calls[i].out->grad_rank_scale));
  }
  return grads;
}

std::vector<RankGradients> rank_gradients(const Tensor& x, const Tensor& flat_x,
                                          const std::vector<DeviceRankCall>& calls, bool needs_grad_x) {
  std::vector<RankGradients> grads = grad_B_of(x, calls, needs_grad_x);
  grad_A_of(flat_x, calls, needs_grad_x, &grads);
  for (RankGradients& grad : grads) grad.p_transposed = HeldTerms();
  return grads;
}

namespace {

// Returns a DeviceWeight that has only sizes and a device, for an operator that does not compute the base product.
DeviceWeight no_weight(const char* op, const DeviceAdapter& adapter) {
  const Tensor &a = *adapter.lora_A, &b = *adapter.lora_B;
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, op, ": lora_A or lora_B is no matrix");
  DeviceWeight weight;
  weight.weight = a;
  weight.outputs = b.size(0);
  weight.inputs = a.size(1);
  return weight;
}

}  // namespace

DeviceForward low_rank_forward(const char* op, const Tensor& x, const Tensor& residual, const DeviceAdapter& adapter) {
  const DeviceSizes size = checked_sizes(op, x, no_weight(op, adapter), adapter);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(
      same_device(residual, x) && residual.scalar_type() == type && residual.numel() == size.tokens * size.outputs, op,
      ": residual is not [..., ", size.outputs, "] of x's type, on its device");
  DeviceForward out;
  out.y = device_empty(x, shape_with_last(x, size.outputs), type);
  out.s = device_empty(x, {size.tokens, size.rank}, ScalarType::Float);
  if (size.tokens == 0) return out;
  STD_TORCH_CHECK(size.inputs > 0 && size.outputs > 0 && size.rank > 0, op, ": lora_A is [", size.rank, ", ",
                  size.inputs, "] and lora_B has ", size.outputs, " rows, wanted at least one of each");
  check_kernel_dtype(op, "x", type);
  const Tensor held = flat_rows(x), onto = flat_rows(residual);
  const Tensor y = as_shape(out.y, {size.tokens, size.outputs});
  const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
  Splitter splitter(x, type);
  const HeldTerms a_terms = splitter.right_of_pass(a, false), b_terms = splitter.right_of_expand(b, false);
  splitter.run();
  const HeldTerms s_terms = left_terms(x, size.tokens, size.padded, type);
  shrink(held, adapter, size, a_terms, out.s, &s_terms);
  expand(y, &s_terms, &b_terms, &onto, std::nullopt);
  return out;
}

DeviceBackward low_rank_backward(const char* op, const Tensor& grad, const Tensor& x, const DeviceAdapter& adapter,
                                 const Tensor& s, bool needs_grad_x) {
  const DeviceSizes size = checked_sizes(op, x, no_weight(op, adapter), adapter);
  check_tensor(op, "grad", grad, x.scalar_type(), size.tokens * size.outputs, x);
  check_tensor(op, "s", s, ScalarType::Float, size.tokens * size.rank, x);
  DeviceBackward out;
  out.grad_rank_scale = device_empty(x, {0}, ScalarType::Float);
  out.grad_x = needs_grad_x ? device_empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type())
                            : device_empty(x, {0}, x.scalar_type());
  if (size.tokens == 0) {
    out.grad_A = device_zeros(x, {size.rank, size.inputs}, adapter.lora_A->scalar_type());
    out.grad_B = device_zeros(x, {size.outputs, size.rank}, adapter.lora_B->scalar_type());
    if (adapter.rank_scale.has_value()) out.grad_rank_scale = device_zeros(x, {size.rank}, ScalarType::Float);
    return out;
  }
  const RankGradients grads =
      rank_gradients(x, flat_rows(x), {{flat_rows(grad), &adapter, size, s, nullptr, &out}}, needs_grad_x)[0];
  if (needs_grad_x)
    expand_dropped(as_shape(out.grad_x, {size.tokens, size.inputs}), grads.p, grads.a, adapter, grads.kept);
  return out;
}

}  // namespace peft_ext
