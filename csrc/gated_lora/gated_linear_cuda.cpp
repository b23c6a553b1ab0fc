// Computes the adapted layer whose input is a gated activation; see gated_linear.cuh. The kernel is in rank_gated.cuh.
#include "gated_lora/cuda/gated_linear.cuh"

#include "linear/cuda/call.cuh"
#include "gated_lora/cuda/rank_gated.cuh"
#include "linear/cuda/rank_plan.cuh"

namespace peft_ext {
namespace {

// Returns whether rank_gated_kernel takes the operands and the rank.
bool gated_read(const Parts& parts, const DeviceSizes& size) {
  const auto whole = [](const RowsApart& rows) { return rows.stride % kVector == 0 && aligned(rows.held, 16); };
  return parts.gate.held.scalar_type() != ScalarType::Float && parts.columns % kVector == 0 && whole(parts.gate) &&
         whole(*parts.up) && parts.columns < kMaxRankColumns && parts.columns > 0 && size.padded <= 32 && size.rank > 0;
}

// Launches rank_gated_kernel, and returns the partial sums of S, or of Pᵀ x̃ if `columns` is true. work: the operands
// and results of the gated activation.
PartialSums gated_pass(const Launcher& launcher, const GatedWork& work, const Parts& parts, const HeldTerms& factor,
                       const DeviceAdapter& adapter, bool columns) {
  const Tensor& like = parts.gate.held;
  const int64_t rank = factor.terms.outer;
  STD_TORCH_CHECK(work.whole, "rank_gated_kernel: an operand or a result is not aligned to 16 bytes");
  GatedPass pass;
  pass.gated = work;
  pass.rows = parts.rows;
  pass.padded_rows = round_up(parts.rows, kRankTile);
  pass.padded_columns = round_up(parts.columns, kRankTile);
  pass.dropout = device_dropout(launcher, adapter);
  pass.factor = read_terms(launcher, factor).data;
  const int64_t row_tiles = pass.padded_rows / kRankTile, column_tiles = pass.padded_columns / kRankTile;
  // The pass is divided into thread blocks as a pass over h, so that the sums have the same order.
  const RankPlan plan = plan_rank_pass(columns ? RankWork::kColumns : RankWork::kRows, row_tiles, column_tiles);
  pass.tiles = columns ? plan.row_tiles : plan.column_tiles;
  pass.chunks = columns ? plan.row_chunks : plan.column_chunks;
  const int64_t padded = columns ? pass.padded_columns : pass.padded_rows;
  const PartialSums found{device_empty(like, {pass.chunks, padded, rank}, ScalarType::Float), pass.chunks, padded,
                          columns ? parts.columns : parts.rows};
  pass.sums = launcher.scratch<float>(found.sums);
  const Grid grid((columns ? column_tiles : row_tiles) * pass.chunks);
  const GatedVariant variant{rank, factor.terms.count, columns};
  if (like.scalar_type() == ScalarType::BFloat16) {
    launch_gated<bf16>(launcher, grid, pass, variant);
  } else {
    launch_gated<f16>(launcher, grid, pass, variant);
  }
  return found;
}

// A call whose operands and sizes are checked. like() is a tensor of the shape, the dtype and the device of h.
struct GatedCall {
  Parts parts;
  Activation activation;
  DeviceSizes size;

  const Tensor& like() const { return parts.gate.held; }
};

GatedCall checked_call(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation,
                       const DeviceWeight& weight, const DeviceAdapter& adapter) {
  const Activation kind = checked_gate(op, activation);
  const Parts parts = gated_parts(op, gate, up, !up.has_value());
  check_same_device(op, "gate", gate, weight.weight, "weight");
  const DeviceSizes size = checked_sizes(op, parts.gate.held, weight, adapter);
  STD_TORCH_CHECK(size.tokens == 0 || (size.inputs > 0 && size.outputs > 0), op, ": weight is [", size.outputs, ", ",
                  size.inputs, "], wanted at least one output and one input");
  return {parts, kind, size};
}

}  // namespace

DeviceForward gated_forward(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t activation,
                            const DeviceWeight& weight, const std::optional<Tensor>& bias,
                            const DeviceAdapter& adapter) {
  const GatedCall call = checked_call(op, gate, up, activation, weight, adapter);
  const ScalarType type = gate.scalar_type();
  const DeviceSizes& size = call.size;
  checked_bias(op, bias, gate, size.outputs);
  if (size.tokens == 0 || !gated_read(call.parts, size) || few_tokens_accept(weight, type, size.tokens, adapter))
    return adapted_forward(op, gated_value(op, gate, up, activation), weight, bias, adapter, false, false);
  const Tensor h = device_empty(gate, call.parts.shape, type);
  const Tensor a = matrix(adapter.lora_A), b = matrix(adapter.lora_B);
  Splitter splitter(gate, type);
  const HeldTerms a_terms = splitter.right_of_pass(a, false);
  const DeviceShrunk shrunk{device_empty(gate, {size.tokens, size.rank}, ScalarType::Float),
                            left_terms(gate, size.tokens, size.padded, type), splitter.right_of_expand(b, false)};
  splitter.run();
  Launcher launcher(gate);
  const GatedWork work = gated_value_work(launcher, call.parts, call.activation, h);
  const PartialSums sums = gated_pass(launcher, work, call.parts, a_terms, adapter, false);
  reduce(sums, size.rank, shrunk_results(adapter, shrunk.s, &shrunk.s_terms));
  return adapted_forward(op, h, weight, bias, adapter, false, false, &shrunk);
}

GatedBackward gated_backward(const char* op, const Tensor& grad, const Tensor& gate, const std::optional<Tensor>& up,
                             int64_t activation, const DeviceWeight& weight, const DeviceAdapter& adapter,
                             const Tensor& s, bool needs_grad_gate) {
  const GatedCall call = checked_call(op, gate, up, activation, weight, adapter);
  const ScalarType type = gate.scalar_type();
  const DeviceSizes& size = call.size;
  check_grad(op, grad, call.like(), size);
  check_tensor(op, "s", s, ScalarType::Float, size.tokens * size.rank, gate);
  GatedBackward out{{device_empty(gate, {0}, type), device_empty(gate, {0}, type)}, {}};
  if (size.tokens == 0 || !needs_grad_gate || !gated_read(call.parts, size)) {
    out.layer = adapted_backward(op, grad, gated_value(op, gate, up, activation), weight, adapter, s, needs_grad_gate,
                                 std::nullopt);
    if (needs_grad_gate) out.grads = gated_gradients(op, out.layer.grad_x, gate, up, activation);
    return out;
  }
  out.layer.grad_rank_scale = device_empty(gate, {0}, ScalarType::Float);
  const Tensor flat_grad = flat_rows(grad), dh = device_empty(gate, {size.tokens, size.inputs}, type);
  const DeviceRankCall ranks{flat_grad, &adapter, size, s, nullptr, &out.layer};
  const RankGradients grads = grad_B_of(gate, {ranks}, true)[0];
  expand_dropped(dh, grads.p, grads.a, adapter, std::nullopt);
  addmm_(dh, flat_grad, dense_weight(weight, type), 1.0);

  out.grads = empty_gated_gradients(gate, up);
  Launcher launcher(gate);
  const GatedWork work = gated_gradient_work(launcher, call.parts, call.activation, {dh, size.inputs}, out.grads);
  const PartialSums sums = gated_pass(launcher, work, call.parts, grads.p_transposed, adapter, true);
  reduce(sums, size.rank, grad_A_results(ranks));
  return out;
}

}  // namespace peft_ext
