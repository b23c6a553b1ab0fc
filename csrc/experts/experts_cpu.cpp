// The CPU operators for the linear layers of a mixture of experts: Y_t = g_e ∘ (x_t W_eᵀ + s (x̃_t A_eᵀ) B_eᵀ) + b_e
// for the rows t of expert e, with x̃ = dropout(x); without DoRA g is 1. The rows of x are sorted by expert. For each
// expert that has rows, lora_experts and lora_experts_backward call the functions of the adapted layer
// (linear/cpu/adapted_linear.h) with the expert's rows, weight and adapter.
#include <string.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "cpu/threads.h"
#include "linear/cpu/adapted_linear.h"
#include "linear/cpu/runs.h"
#include "linear/cpu/weight_norm.h"

namespace peft_ext {
namespace {

std::vector<Run> make_runs(const char* op, const Tensor& offsets, int64_t experts, int64_t rows) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Long && offsets.dim() == 1 && offsets.numel() == experts, op,
                  ": offsets is ", torch::headeronly::toString(offsets.scalar_type()), " with ", offsets.numel(),
                  " elements, wanted Long [", experts, "]");
  const Tensor held = as_contiguous(offsets);
  const int64_t* ends = held.const_data_ptr<int64_t>();
  std::vector<Run> runs;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t end = ends[expert];
    STD_TORCH_CHECK(end >= begin && end <= rows, op, ": offsets has ", end, " at ", expert, ", wanted ", begin, " to ",
                    rows);
    if (end > begin) runs.push_back({expert, begin, end});
    begin = end;
  }
  return runs;
}

// Returns a view of one expert's matrix in a stack with any strides.
Tensor of_stack(const Tensor& stack, int64_t expert) {
  return part_of(stack, expert * stack.stride(0), {stack.size(1), stack.size(2)}, {stack.stride(1), stack.stride(2)});
}

// Copies the matrices of the given experts between `stack` [E, N, R], with any strides, and the contiguous stack
// `whole`; kToStack copies from `whole` to `stack`. Each thread copies a range of rows, and copies a row of every given
// expert before the next row: in PEFT's lora_B the experts are the innermost dimension, so that copying one expert
// after another would fetch a cache line for each element.
template <typename T, bool kToStack>
void copy_stack(const Tensor& stack, T* whole, const std::vector<int64_t>& experts) {
  auto* strided = static_cast<T*>(const_cast<void*>(stack.const_data_ptr()));
  const auto count = static_cast<int64_t>(experts.size());
  const int64_t rows = stack.size(1), columns = stack.size(2);
  const int64_t by_expert = stack.stride(0), by_row = stack.stride(1), by_column = stack.stride(2);
  parallel_for(0, rows, ceil_div(kPackGrain, count * columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (const int64_t expert : experts) {
        T* from = strided + expert * by_expert + row * by_row;
        T* to = whole + (expert * rows + row) * columns;
        for (int64_t column = 0; column < columns; ++column)
          kToStack ? from[column * by_column] = to[column] : to[column] = from[column * by_column];
      }
  });
}

template <bool kToStack>
void copy_stack(const Tensor& stack, const Tensor& whole, const std::vector<int64_t>& experts) {
  void* data = const_cast<void*>(whole.const_data_ptr());
  stack.element_size() == 4 ? copy_stack<uint32_t, kToStack>(stack, static_cast<uint32_t*>(data), experts)
                            : copy_stack<uint16_t, kToStack>(stack, static_cast<uint16_t*>(data), experts);
}

// Returns the stack if the stack is contiguous, otherwise a contiguous stack into which only the matrices of the runs'
// experts are copied: with few tokens, a copy of all experts would take most of the time.
Tensor in_one_piece(const Tensor& stack, const std::vector<Run>& runs) {
  if (stack.is_contiguous()) return stack;
  const Tensor whole = empty({stack.size(0), stack.size(1), stack.size(2)}, stack.scalar_type());
  std::vector<int64_t> experts;
  for (const Run& run : runs) experts.push_back(run.expert);
  copy_stack<false>(stack, whole, experts);
  return whole;
}

void copy_back(const Tensor& stack, const Tensor& whole) {
  std::vector<int64_t> experts(static_cast<size_t>(stack.size(0)));
  std::iota(experts.begin(), experts.end(), int64_t{0});
  copy_stack<true>(stack, whole, experts);
}

// The weights of all experts: dense [E, N, K], or packed. Each expert is packed separately, and each tensor of `parts`
// holds the experts' parts in order, except that the experts of a double-quantized NF4 weight share one table
// nested_code.
struct Weights {
  Tensor weight;
  WeightParts parts;
  int64_t layout, experts, out, in;

  FrozenWeight of(const char* op, int64_t expert) const {
    if (layout == 0) return checked_weight(op, of_stack(weight, expert), WeightParts(kWeightParts - 1), 0, {out, in});
    constexpr size_t kTable = 2;
    const bool nested_nf4 = layout >> kFormatShift == 0 && parts[1].has_value();
    const auto piece = [&](const Tensor& tensor) {
      const int64_t count = tensor.numel() / experts;
      return part_of(tensor, expert * count, {count}, {1});
    };
    WeightParts own(parts.size());
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!parts[i].has_value()) continue;
      own[i] = nested_nf4 && i == kTable ? part_of(*parts[i], 0, {kNestedCodes}, {1}) : piece(*parts[i]);
    }
    return checked_weight(op, piece(weight), own, layout, {out, in});
  }
};

Weights checked_weights(const char* op, const Tensor& weight, const WeightParts& parts, int64_t layout,
                        const std::vector<int64_t>& shape, ScalarType type) {
  STD_TORCH_CHECK(shape.size() == 3, op, ": weight has ", shape.size(), " dimensions, wanted [E, N, K]");
  checked_numel(shape);
  Weights held{weight, parts, layout, shape[0], shape[1], shape[2]};
  if (layout == 0 && !parts[0].has_value()) {
    STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 3 && weight.size(0) == shape[0] && weight.size(1) == shape[1] &&
                        weight.size(2) == shape[2] && weight.scalar_type() == type,
                    op, ": weight is ", torch::headeronly::toString(weight.scalar_type()), " with ", weight.numel(),
                    " elements, wanted ", torch::headeronly::toString(type), " [", shape[0], ", ", shape[1], ", ",
                    shape[2], "] on the CPU");
    return held;
  }
  // Weights::of checks the sizes of each expert's parts with checked_weight.
  if (layout >> kFormatShift != 0) {
    const auto whole = [&](const char* argument, const Tensor& part) {
      STD_TORCH_CHECK(shape[0] == 0 || part.numel() % shape[0] == 0, op, ": ", argument, " has ", part.numel(),
                      " elements, wanted equally many for each of ", shape[0], " experts");
      return as_contiguous(part);
    };
    held.weight = whole("weight", weight);
    for (auto& part : held.parts)
      if (part.has_value()) part = whole("a part of the weight", *part);
    return held;
  }
  check_blocksize(op, layout);
  const int64_t codes = ceil_div(shape[1] * shape[2], 2), blocks = ceil_div(shape[1] * shape[2], layout);
  held.weight = checked_part(op, "weight", weight, ScalarType::Byte, shape[0] * codes);
  const bool nested = parts[1].has_value();
  STD_TORCH_CHECK(parts[0].has_value(), op, ": absmax is None, wanted the scales of an NF4 weight");
  held.parts[0] =
      checked_part(op, "absmax", *parts[0], nested ? ScalarType::Byte : ScalarType::Float, shape[0] * blocks);
  if (nested) {
    STD_TORCH_CHECK(parts[2].has_value() && parts[3].has_value(), op,
                    ": nested_absmax is given without nested_code and nested_offset");
    held.parts[1] =
        checked_part(op, "nested_absmax", *parts[1], ScalarType::Float, shape[0] * ceil_div(blocks, kNestedBlock));
    held.parts[2] = checked_part(op, "nested_code", *parts[2], ScalarType::Float, kNestedCodes);
    held.parts[3] = checked_part(op, "nested_offset", *parts[3], ScalarType::Float, shape[0]);
  }
  return held;
}

// The adapters lora_A [E, R, K] and lora_B [E, N, R] as contiguous stacks. In a copied stack, the matrices of experts
// without rows are uninitialized, see in_one_piece. lora_A and lora_B have no value if the layers have no adapter.
// out_scale [E, N] float32 is DoRA's g.
struct Adapters {
  std::optional<Tensor> lora_A, lora_B, out_scale;
  double scaling;
  Dropout dropout;

  int64_t rank() const { return lora_A.has_value() ? lora_A->size(1) : 0; }

  // Returns the adapter of one expert. The expert's number is added to the offset of dropout's seed, so that each
  // expert draws its own mask.
  Adapter of(int64_t expert) const {
    Adapter adapter;
    if (!lora_A.has_value()) return adapter;
    adapter.lora_A = of_stack(*lora_A, expert);
    adapter.lora_B = of_stack(*lora_B, expert);
    if (out_scale.has_value()) {
      const int64_t outputs = lora_B->size(1);
      adapter.out_scale = part_of(*out_scale, expert * outputs, {outputs}, {1});
    }
    adapter.scaling = scaling;
    adapter.dropout = dropout;
    adapter.dropout.offset += static_cast<uint64_t>(expert);
    return adapter;
  }
};

Adapters checked_adapters(const char* op, const Weights& weights, const std::optional<Tensor>& lora_A,
                          const std::optional<Tensor>& lora_B, const std::optional<Tensor>& out_scale, double scaling,
                          double dropout_p, const std::optional<Tensor>& seed, const std::vector<Run>& runs) {
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), op, ": one of lora_A and lora_B is missing");
  if (lora_A.has_value()) {
    const Tensor &a = *lora_A, &b = *lora_B;
    STD_TORCH_CHECK(a.is_cpu() && a.dim() == 3 && a.size(0) == weights.experts && a.size(2) == weights.in, op,
                    ": lora_A has ", a.numel(), " elements, wanted [", weights.experts, ", R, ", weights.in,
                    "] on the CPU");
    STD_TORCH_CHECK(b.is_cpu() && b.dim() == 3 && b.size(0) == weights.experts && b.size(1) == weights.out &&
                        b.size(2) == a.size(1),
                    op, ": lora_B has ", b.numel(), " elements, wanted [", weights.experts, ", ", weights.out, ", ",
                    a.size(1), "] on the CPU");
    dtype_of(op, "lora_A", a);
    dtype_of(op, "lora_B", b);
  }
  Adapters held{std::nullopt, std::nullopt, std::nullopt, scaling, make_dropout(op, dropout_p, seed)};
  STD_TORCH_CHECK(!out_scale.has_value() || lora_A.has_value(), op, ": out_scale is given without lora_A");
  if (out_scale.has_value()) held.out_scale = float_vector(op, "out_scale", *out_scale, weights.experts * weights.out);
  if (lora_A.has_value()) {
    held.lora_A = in_one_piece(*lora_A, runs);
    held.lora_B = in_one_piece(*lora_B, runs);
  }
  return held;
}

// Sets the matrices of experts without rows to zero in a contiguous stack.
void clear_others(const Tensor& stack, const std::vector<Run>& runs) {
  const int64_t experts = stack.size(0);
  if (stack.numel() == 0) return;
  const int64_t bytes = stack.numel() / experts * static_cast<int64_t>(stack.element_size());
  auto* data = static_cast<char*>(stack.mutable_data_ptr());
  int64_t next = 0;  // first expert whose matrix is neither cleared nor skipped yet
  const auto clear_to = [&](int64_t expert) {
    if (expert > next) memset(data + next * bytes, 0, static_cast<size_t>((expert - next) * bytes));
    next = expert + 1;
  };
  for (const Run& run : runs) clear_to(run.expert);
  clear_to(experts);
}

// Sets the rows of `matrix` after the last expert's rows to zero.
void clear_rest(const Tensor& matrix, const std::vector<Run>& runs) {
  const int64_t first = runs.empty() ? 0 : runs.back().end, left = matrix.size(0) - first;
  if (left == 0 || matrix.size(1) == 0) return;
  const int64_t bytes = matrix.size(1) * static_cast<int64_t>(matrix.element_size());
  memset(static_cast<char*>(matrix.mutable_data_ptr()) + first * bytes, 0, static_cast<size_t>(left * bytes));
}

std::tuple<Tensor, Tensor, Tensor> lora_experts_cpu(
    Tensor x, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2, std::optional<Tensor> part3,
    std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape, std::optional<Tensor> bias, Tensor offsets,
    std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, std::optional<Tensor> out_scale, double scaling,
    double dropout_p, std::optional<Tensor> seed, bool want_z) {
  constexpr const char* kOp = "lora_experts";
  const ScalarType type = x.scalar_type();
  const Weights weights = checked_weights(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const Tensor held_x = checked_rows(kOp, "x", x, weights.in);
  const std::vector<Run> runs = make_runs(kOp, offsets, weights.experts, held_x.size(0));
  const Adapters adapters = checked_adapters(kOp, weights, lora_A, lora_B, out_scale, scaling, dropout_p, seed, runs);
  std::optional<Tensor> held_bias;
  if (bias.has_value()) held_bias = checked_part(kOp, "bias", *bias, type, weights.experts * weights.out);
  const Tensor y = empty({held_x.size(0), weights.out}, type);
  const Tensor s =
      lora_A.has_value() ? empty({held_x.size(0), adapters.rank()}, ScalarType::Float) : none(ScalarType::Float);
  const Tensor z = want_z ? empty({held_x.size(0), weights.out}, type) : none(type);
  clear_rest(y, runs);
  if (lora_A.has_value()) clear_rest(s, runs);
  if (want_z) clear_rest(z, runs);
  each_run(runs, {weights.in * weights.out, weights.out}, [&](const Run& run) {
    AdaptedForward room;
    room.y = rows_of_run(y, run);
    room.s = lora_A.has_value() ? rows_of_run(s, run) : none();
    room.z = want_z ? rows_of_run(z, run) : none(type);
    std::optional<Tensor> own_bias;
    if (held_bias.has_value()) own_bias = part_of(*held_bias, run.expert * weights.out, {weights.out}, {1});
    adapted_forward(kOp, rows_of_run(held_x, run), weights.of(kOp, run.expert), own_bias, adapters.of(run.expert),
                    false, want_z, &room);
  });
  return {y, s, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_experts_backward_cpu(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
    std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout, std::vector<int64_t> shape,
    Tensor offsets, std::optional<Tensor> lora_A, std::optional<Tensor> lora_B, std::optional<Tensor> out_scale,
    Tensor s, Tensor z, double scaling, double dropout_p, std::optional<Tensor> seed, bool needs_grad_x,
    bool needs_grad_scale) {
  constexpr const char* kOp = "lora_experts_backward";
  const ScalarType type = x.scalar_type();
  const Weights weights = checked_weights(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const Tensor held_x = checked_rows(kOp, "x", x, weights.in);
  const Tensor held_grad = checked_rows(kOp, "grad", grad, weights.out, &held_x);
  const std::vector<Run> runs = make_runs(kOp, offsets, weights.experts, held_x.size(0));
  const Adapters adapters = checked_adapters(kOp, weights, lora_A, lora_B, out_scale, scaling, dropout_p, seed, runs);
  const int64_t rank = adapters.rank();
  Tensor grad_x = none(type), grad_A = none(), grad_B = none(), held_s;
  Tensor out_A = grad_A, out_B = grad_B;  // the gradients, with the strides of lora_A and lora_B
  if (lora_A.has_value()) {
    held_s = checked_part(kOp, "s", s, ScalarType::Float, held_x.size(0) * rank);
    held_s = as_shape(held_s, {held_x.size(0), rank});
    out_A = torch::stable::empty_like(*lora_A);
    out_B = torch::stable::empty_like(*lora_B);
    grad_A = out_A.is_contiguous() ? out_A : empty({weights.experts, rank, weights.in}, lora_A->scalar_type());
    grad_B = out_B.is_contiguous() ? out_B : empty({weights.experts, weights.out, rank}, lora_B->scalar_type());
    clear_others(grad_A, runs);
    clear_others(grad_B, runs);
  }
  Tensor grad_scale = none(), held_z;
  if (needs_grad_scale) {
    STD_TORCH_CHECK(out_scale.has_value(), kOp, ": the gradient of out_scale is asked for, and it is None");
    held_z = checked_rows(kOp, "z", z, weights.out, &held_x);
    grad_scale = empty({weights.experts, weights.out}, ScalarType::Float);
    clear_others(grad_scale, runs);
  }
  if (needs_grad_x) {
    grad_x = empty({held_x.size(0), weights.in}, type);
    clear_rest(grad_x, runs);
  }
  each_run(runs, {weights.in * weights.out, weights.in}, [&](const Run& run) {
    const Adapter adapter = adapters.of(run.expert);
    std::optional<Tensor> own_s, room;
    if (rank > 0) own_s = rows_of_run(held_s, run);
    if (needs_grad_x) room = rows_of_run(grad_x, run);
    const AdaptedBackward own = adapted_backward(kOp, rows_of_run(held_grad, run), rows_of_run(held_x, run),
                                                 weights.of(kOp, run.expert), adapter, own_s, needs_grad_x, room);
    if (!lora_A.has_value()) return;
    if (needs_grad_scale) {
      const Tensor sums =
          scale_gradient(kOp, rows_of_run(held_grad, run), rows_of_run(held_x, run), weights.of(kOp, run.expert),
                         adapter, own_s, rows_of_run(held_z, run), false, std::nullopt);
      memcpy(grad_scale.mutable_data_ptr<float>() + run.expert * weights.out, sums.const_data_ptr<float>(),
             static_cast<size_t>(weights.out) * sizeof(float));
    }
    for (const auto& [stack, one] : {std::pair(&grad_A, &own.grad_A), std::pair(&grad_B, &own.grad_B)}) {
      const int64_t bytes = one->numel() * static_cast<int64_t>(one->element_size());
      memcpy(static_cast<char*>(stack->mutable_data_ptr()) + run.expert * bytes, one->const_data_ptr(),
             static_cast<size_t>(bytes));
    }
  });
  if (!out_A.is_contiguous()) copy_back(out_A, grad_A);
  if (!out_B.is_contiguous()) copy_back(out_B, grad_B);
  return {grad_x, out_A, out_B, grad_scale};
}

Tensor dora_experts_weight_norm_cpu(Tensor weight, std::optional<Tensor> part1, std::optional<Tensor> part2,
                                    std::optional<Tensor> part3, std::optional<Tensor> part4, int64_t layout,
                                    std::vector<int64_t> shape, std::optional<Tensor> offsets, Tensor lora_A,
                                    Tensor lora_B, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_experts_weight_norm";
  const Weights weights = checked_weights(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  // A run of the norm covers all rows of the W of an expert. If `offsets` has a value, experts without rows of x get no
  // run.
  std::vector<Run> runs;
  if (offsets.has_value()) {
    runs = make_runs(kOp, *offsets, weights.experts, INT64_MAX);
    for (Run& run : runs) run = {run.expert, 0, weights.out};
  } else {
    for (int64_t expert = 0; expert < weights.experts; ++expert) runs.push_back({expert, 0, weights.out});
  }
  const Adapters adapters =
      checked_adapters(kOp, weights, lora_A, lora_B, std::nullopt, scaling, 0.0, std::nullopt, runs);
  const Tensor norm = empty({weights.experts, weights.out}, ScalarType::Float);
  clear_others(norm, runs);
  constexpr int64_t kRowsTogether = 64;  // threads that compute a norm together divide the rows of W by so many rows
  each_run(runs, {weights.in * adapters.rank(), 1, kRowsTogether}, [&](const Run& run) {
    const Adapter adapter = adapters.of(run.expert);
    const Tensor own =
        weight_norm(kOp, weights.of(kOp, run.expert), *adapter.lora_A, *adapter.lora_B, scaling, type).norm;
    memcpy(norm.mutable_data_ptr<float>() + run.expert * weights.out, own.const_data_ptr<float>(),
           static_cast<size_t>(weights.out) * sizeof(float));
  });
  return norm;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("lora_experts", PEFT_EXT_CPU_BOX(&peft_ext::lora_experts_cpu));
  m.impl("lora_experts_backward", PEFT_EXT_CPU_BOX(&peft_ext::lora_experts_backward_cpu));
  m.impl("dora_experts_weight_norm", PEFT_EXT_CPU_BOX(&peft_ext::dora_experts_weight_norm_cpu));
}
