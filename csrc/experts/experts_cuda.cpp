// The CUDA operators for the linear layers of a mixture of experts: Y_t = g_e ∘ (x_t W_eᵀ + s (x̃_t A_eᵀ) B_eᵀ) + b_e
// for the rows t of expert e, with x̃ = dropout(x); without DoRA g is 1. The rows of x are sorted by expert. The number
// of launches does not depend on the number of experts, and the host does not wait for the values in `offsets`. The
// steps:
//
//   forward:   tables of the rows (row_runs); bfloat16 terms of A_e and B_e (stacks); S in one pass over x; Y in
//              one product (product.cuh), to which S B_eᵀ, DoRA's g and b_e are applied before Y is stored.
//   backward:  tables of the rows; bfloat16 terms of B_e (for dX also A_e); P = s dY B_e; dB_e = s dYᵀ S;
//              dA_e = Pᵀ x̃; dX in one product, to which mask ∘ (P A_e) is added. For DoRA, P is computed from terms
//              of g ∘ B_e, g also multiplies dB_e when the partial sums of dB_e are added, and one more pass computes
//              dg, and G = g ∘ dY, from which dX is computed.
//   DoRA's norm: bfloat16 terms of A_e and B_e; one pass over W (dora.cuh).
//
// With many rows per expert and dense, aligned bfloat16 weights (see takes_grouped_mm), on GPUs of compute capability
// 9.x and 10.x, PyTorch's grouped product computes x W_eᵀ in the forward and dY W_e (with DoRA G W_e) in the backward,
// and a kernel computes the other operations: the low-rank term, DoRA's g and the bias.
#include <array>
#include <tuple>

#include "experts/cuda/product_call.cuh"
#include "experts/cuda/stack_call.cuh"
#include "linear/cuda/passes.cuh"
#include "linear/cuda/rank_plan.cuh"

namespace peft_ext {
namespace {

// From this mean number of rows per expert on, arithmetic limits the time of the product, and PyTorch's grouped product
// is faster than experts_product_kernel, whose tiles of 64 x 128 read each operand more often.
constexpr int64_t kManyRows = 128;

// Checks a matrix [S, columns] of the S rows of all experts, and returns the matrix as a contiguous tensor.
Tensor checked_rows(const char* op, const char* argument, const Tensor& rows, int64_t columns, const Tensor& like) {
  check_same_device(op, argument, rows, like, "weight");
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == columns, op, ": ", argument, " has ", rows.numel(),
                  " elements in ", rows.dim(), " dimensions, wanted [S, ", columns, "]");
  check_kernel_dtype(op, argument, rows.scalar_type());
  return as_contiguous(rows);
}

Tensor checked_ends(const char* op, const Tensor& offsets, const DeviceStack& stack) {
  STD_TORCH_CHECK(same_device(offsets, stack.all.weight) && offsets.scalar_type() == ScalarType::Long &&
                      offsets.numel() == stack.experts,
                  op, ": offsets is ", torch::headeronly::toString(offsets.scalar_type()), " with ", offsets.numel(),
                  " elements, wanted Long with ", stack.experts, " on weight's device");
  return as_contiguous(offsets);
}

// --- rows

// Inputs and results of make_rows, with the names of RunRows in experts/cuda/stacks.cuh.
struct RowsWanted {
  const PartialSums* partial = nullptr;
  const Tensor* given = nullptr;
  double scale = 1.0, after = 1.0;
  const Tensor* plain = nullptr;
  const HeldTerms *terms = nullptr, *transposed = nullptr;
};

void make_rows(const RowRuns& runs, const StackAdapters& adapters, const RowsWanted& wanted) {
  Launcher launcher(runs.tiles);
  RunRows work{};
  work.padded_rows = runs.padded_rows();
  work.rank = adapters.rank;
  work.padded_rank = adapters.padded;
  work.tiles = read_tiles(launcher, runs);
  work.scale = static_cast<float>(wanted.scale);
  work.after = static_cast<float>(wanted.after);
  if (wanted.partial != nullptr) {
    work.partial = launcher.in<float>(wanted.partial->sums);
    work.chunks = wanted.partial->chunks;
  }
  if (wanted.given != nullptr) work.given = launcher.in<float>(*wanted.given);
  if (wanted.plain != nullptr) work.plain = launcher.scratch<float>(*wanted.plain);
  if (wanted.terms != nullptr) work.terms = write_terms(launcher, *wanted.terms);
  if (wanted.transposed != nullptr) work.transposed = write_terms(launcher, *wanted.transposed);
  launcher(run_rows_kernel, ceil_div(work.padded_rows * work.padded_rank / 2, kStackThreads), kStackThreads, work);
}

// A gradient `out` [E, ., .], of lora_A or lora_B, that stack_reduce_kernel computes from partial sums. Dimension
// column_dim of `out` runs over the columns of x (for lora_A) or of dY (for lora_B).
struct StackGradient {
  const PartialSums* partial;
  const Tensor* out;
  int column_dim;
  double scale;
  const Tensor* column_scale;  // factors [E, columns] of the gradient, or null
};

void reduce_stacks(const RowRuns& runs, const StackAdapters& adapters, const StackGradient (&gradients)[2]) {
  Launcher launcher(runs.first_chunk);
  StackReduces work{};
  int64_t columns = 0;
  for (int i = 0; i < 2; ++i) {
    const StackGradient& from = gradients[i];
    const Tensor& out = *from.out;
    StackReduce& to = work.work[i];
    to.partial = launcher.in<float>(from.partial->sums);
    to.first_chunk = launcher.in<int32_t>(runs.first_chunk);
    to.columns = out.size(from.column_dim);
    to.padded_columns = from.partial->padded_rows;
    to.rank = adapters.rank;
    to.padded_rank = adapters.padded;
    to.scale = static_cast<float>(from.scale);
    if (from.column_scale != nullptr) to.column_scale = launcher.in<float>(*from.column_scale);
    to.out = launcher.scratch<void>(out);
    to.type = dtype_of(out.scalar_type());
    to.by_expert = out.stride(0);
    to.by_column = out.stride(from.column_dim);
    to.by_rank = out.stride(3 - from.column_dim);
    columns = std::max(columns, to.columns);
  }
  launcher(stack_reduce_kernel, {ceil_div(columns * adapters.padded / 2, kStackThreads), runs.experts, 2},
           kStackThreads, work);
}

// --- products

// The low-rank term left · rightᵀ of a product, as bfloat16 terms; `kept` holds the bits of dropout's mask.
struct LowRank {
  const HeldTerms *left, *right;
  const std::optional<Tensor>* kept = nullptr;
  const DeviceAdapter* dropout = nullptr;  // null: no dropout mask is applied to the term
};

// Returns whether this call uses PyTorch's grouped product in place of experts_product_kernel.
bool takes_grouped_mm(const Tensor& left, const DeviceStack& stack) {
  if (stack.all.is_nf4() || left.scalar_type() != ScalarType::BFloat16 || left.size(0) < kManyRows * stack.experts)
    return false;
#ifndef PEFT_EXT_EMULATE_CUDA
  const int major = compute_capability(left.get_device_index()) / 10;
  // On GPUs of other compute capabilities PyTorch copies `ends` to the host and runs one product per expert.
  if (major != 9 && major != 10) return false;
#endif
  const Tensor& weight = stack.all.weight;
  const bool along = weight.stride(2) == 1, across = weight.stride(1) == 1;
  return (along || across) && multiple(weight.stride(along ? 1 : 2), kVector) && multiple(weight.stride(0), kVector) &&
         multiple(stack.all.outputs, kVector) && multiple(stack.all.inputs, kVector) && aligned(weight, 16) &&
         aligned(left, 16);
}

// Returns left W_eᵀ [rows, N] (with `transpose`) or left W_e [rows, K], by PyTorch's grouped product.
Tensor grouped_mm(const Tensor& left, const DeviceStack& stack, const RowRuns& runs, bool transpose) {
  const Tensor right = transpose ? torch::stable::transpose(stack.all.weight, 1, 2) : stack.all.weight;
  Tensor first_row = runs.first_row;
  const Tensor ends_32 = torch::stable::narrow(first_row, 0, 1, stack.experts);
  std::array<StableIValue, 5> arguments{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                        torch::stable::detail::from(std::optional<Tensor>(ends_32)),
                                        torch::stable::detail::from(std::optional<Tensor>()),
                                        torch::stable::detail::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_grouped_mm", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// The operands that are applied to a product after the low-rank term.
struct Finish {
  std::optional<Tensor> bias, scale, z;  // z receives the value that `scale` multiplies
};

// Returns scale ∘ (left W_eᵀ + low-rank term) + bias; without `transpose`, W_e stands in place of W_eᵀ. The scale and
// the bias are those of `finish`, and are left out if they have no value.
Tensor experts_product(const Tensor& left, const DeviceStack& stack, const Tensor& ends, const RowRuns& runs,
                       bool transpose, const LowRank* low_rank, const Finish& finish = {}) {
  const int64_t rows = left.size(0), columns = transpose ? stack.all.outputs : stack.all.inputs;
  const ScalarType type = left.scalar_type();
  const bool grouped = takes_grouped_mm(left, stack);
  const Tensor out = grouped ? grouped_mm(left, stack, runs, transpose) : device_empty(left, {rows, columns}, type);
  Launcher launcher(left);
  ExpertsProduct work{};
  work.out = grouped ? launcher.out<void>(out) : launcher.scratch<void>(out);
  work.columns = columns;
  work.inner = left.size(1);
  work.tiles = read_tiles(launcher, runs);
  bool whole = multiple(columns, kVector) && aligned(out, 16);
  for (const std::optional<Tensor>* given : {&finish.bias, &finish.scale, &finish.z})
    whole = whole && (!given->has_value() || aligned(**given, 16));
  work.bias = launcher.in<void>(finish.bias);
  work.scale = launcher.in<float>(finish.scale);
  if (finish.z.has_value()) work.z = launcher.scratch<void>(*finish.z);
  if (low_rank != nullptr) {
    work.low_left = read_terms(launcher, *low_rank->left);
    work.low_right = read_terms(launcher, *low_rank->right);
    work.right_stride = terms_stride(*low_rank->right);
    if (low_rank->dropout != nullptr && low_rank->dropout->seed.has_value()) {
      whole = whole && low_rank->kept->has_value();
      if (whole) work.kept = static_cast<const uint32_t*>(launcher.in<void>(**low_rank->kept));
      work.dropout = device_dropout(launcher, *low_rank->dropout);
    }
  }
  if (grouped) {
    work.column_tiles = ceil_div(columns, kExpandTile);
    with_type(type, [&](auto zero) { launch_experts_onto<decltype(zero)>(launcher, work, whole, runs.tile_room); });
    return out;
  }

  work.left = launcher.in<void>(left);
  work.column_tiles = ceil_div(columns, kProductColumns);
  ProductVariant variant{stack.all.is_nf4(), StackOrder::kAny, runs.tile_room};
  work.weight = stack_view(launcher, stack, transpose);
  const StackView& view = work.weight;
  whole = whole && multiple(work.inner, kVector) && work.inner < kMaxRankColumns && aligned(left, 16) &&
          aligned(stack.all.weight, 16);
  if (stack.all.is_nf4()) {
    // The NF4 codes that a thread decodes for a slab must share one scale and be aligned for one load.
    whole = whole && multiple(stack.all.inputs, kSmallestBlock);
  } else {
    const bool one = view.by_column == 1 || view.by_inner == 1;
    whole = whole && one && multiple(view.by_expert, kVector) &&
            multiple(view.by_inner == 1 ? view.by_column : view.by_inner, kVector);
  }
  if (whole) variant.order = view.by_inner == 1 ? StackOrder::kAlong : StackOrder::kAcross;
  with_type(type, [&](auto zero) { launch_experts_product<decltype(zero)>(launcher, work, variant); });
  return out;
}

// --- DoRA

// Returns G = g_e ∘ dY if `wanted`, otherwise an empty tensor. If z is not null, the function also writes the gradient
// of g to grad_scale.
Tensor scaled_rows(const Tensor& grad, const Tensor* z, const Tensor& scale, const RowRuns& runs, bool wanted,
                   const Tensor& grad_scale) {
  const ScalarType type = grad.scalar_type();
  const int64_t columns = grad.size(1);
  const Tensor out = device_empty(grad, {wanted ? grad.size(0) : 0, columns}, type);
  if (!wanted && z == nullptr) return out;
  Launcher launcher(grad);
  ScaleRuns work{};
  work.grad = launcher.in<void>(grad);
  work.scale = launcher.in<float>(scale);
  work.tiles = read_tiles(launcher, runs);
  work.columns = columns;
  if (wanted) work.out = launcher.scratch<void>(out);
  bool whole = multiple(columns, kVector) && aligned(grad, 16) && aligned(scale, 16);
  Tensor partial;
  if (z != nullptr) {
    whole = whole && aligned(*z, 16);
    work.z = launcher.in<void>(*z);
    partial = device_empty(grad, {runs.tile_room, columns}, ScalarType::Float);
    work.partial = launcher.scratch<float>(partial);
  }
  with_type(type, [&](auto zero) { launch_scale_runs<decltype(zero)>(launcher, work, whole, runs.tile_room); });
  if (z == nullptr) return out;
  ScaleReduce sums{};
  sums.partial = launcher.in<float>(partial);
  sums.first_tile = launcher.in<int32_t>(runs.first_tile);
  sums.columns = columns;
  sums.out = launcher.scratch<float>(grad_scale);
  launcher(scale_reduce_kernel, {ceil_div(columns, kStackThreads), runs.experts}, kStackThreads, sums);
  return out;
}

// --- operators

std::tuple<Tensor, Tensor, Tensor> lora_experts_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1, const std::optional<Tensor>& part2,
    const std::optional<Tensor>& part3, const std::optional<Tensor>& part4, int64_t layout,
    const std::vector<int64_t>& shape, const std::optional<Tensor>& bias, const Tensor& offsets,
    const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, const std::optional<Tensor>& out_scale,
    double scaling, double dropout_p, const std::optional<Tensor>& seed, bool want_z) {
  constexpr const char* kOp = "lora_experts";
  const ScalarType type = x.scalar_type();
  const DeviceStack stack = checked_stack(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const Tensor held = checked_rows(kOp, "x", x, stack.all.inputs, stack.all.weight);
  const StackAdapters adapters = checked_adapters(kOp, stack, lora_A, lora_B, out_scale, scaling, dropout_p, seed);
  const Tensor ends = checked_ends(kOp, offsets, stack);
  Finish finish;
  if (bias.has_value()) {
    check_matrix(kOp, "bias", *bias, x);
    STD_TORCH_CHECK(bias->numel() == stack.experts * stack.all.outputs && bias->scalar_type() == type, kOp,
                    ": bias is ", torch::headeronly::toString(bias->scalar_type()), " with ", bias->numel(),
                    " elements, wanted ", torch::headeronly::toString(type), " [", stack.experts, ", ",
                    stack.all.outputs, "]");
    finish.bias = as_contiguous(*bias);
  }
  const int64_t rows = held.size(0);
  const Tensor s = adapters.rank > 0 ? device_empty(held, {rows, adapters.rank}, ScalarType::Float)
                                     : device_empty(held, {0}, ScalarType::Float);
  const Tensor none = device_empty(held, {0}, type);
  finish.scale = adapters.out_scale;
  if (want_z) finish.z = device_empty(held, {rows, stack.all.outputs}, type);
  if (rows == 0 || stack.all.outputs == 0)
    return {device_empty(held, {rows, stack.all.outputs}, type), s, want_z ? *finish.z : none};
  const RowRuns runs = row_runs(kOp, ends, rows);
  if (adapters.rank == 0) return {experts_product(held, stack, ends, runs, true, nullptr, finish), s, none};

  StackSplitter splitter(held, type, stack.experts, &ends);
  const HeldTerms a = splitter.right_of_pass(*adapters.lora_A, false, adapters.padded);
  const HeldTerms b = splitter.right_of_product(*adapters.lora_B, false, adapters.padded);
  splitter.run();
  PassInput input = dense_input(held, &adapters.scale);
  input.runs = &runs;
  const PassSums sums = rank_pass(input, &a, nullptr);
  const HeldTerms s_terms = left_terms(held, runs.padded_rows(), adapters.padded, type);
  RowsWanted wanted;
  wanted.partial = &sums.rows;
  wanted.scale = adapters.divided();
  wanted.after = scaling;
  wanted.plain = &s;
  wanted.terms = &s_terms;
  make_rows(runs, adapters, wanted);
  const LowRank low_rank{&s_terms, &b};
  return {experts_product(held, stack, ends, runs, true, &low_rank, finish), s, want_z ? *finish.z : none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_experts_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& part1,
    const std::optional<Tensor>& part2, const std::optional<Tensor>& part3, const std::optional<Tensor>& part4,
    int64_t layout, const std::vector<int64_t>& shape, const Tensor& offsets, const std::optional<Tensor>& lora_A,
    const std::optional<Tensor>& lora_B, const std::optional<Tensor>& out_scale, const Tensor& s, const Tensor& z,
    double scaling, double dropout_p, const std::optional<Tensor>& seed, bool needs_grad_x, bool needs_grad_scale) {
  constexpr const char* kOp = "lora_experts_backward";
  const ScalarType type = x.scalar_type();
  const DeviceStack stack = checked_stack(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const Tensor held = checked_rows(kOp, "x", x, stack.all.inputs, stack.all.weight);
  Tensor held_grad = checked_rows(kOp, "grad", grad, stack.all.outputs, stack.all.weight);
  const StackAdapters adapters = checked_adapters(kOp, stack, lora_A, lora_B, out_scale, scaling, dropout_p, seed);
  const Tensor ends = checked_ends(kOp, offsets, stack);
  const int64_t rows = held.size(0), rank = adapters.rank;
  STD_TORCH_CHECK(held_grad.size(0) == rows && held_grad.scalar_type() == type, kOp, ": grad has ", held_grad.size(0),
                  " rows of ", torch::headeronly::toString(held_grad.scalar_type()), ", wanted ", rows, " of ",
                  torch::headeronly::toString(type));
  Tensor grad_x = device_empty(held, {0}, type), grad_A = device_empty(held, {0}, ScalarType::Float), grad_B = grad_A;
  if (rank > 0) {
    check_tensor(kOp, "s", s, ScalarType::Float, rows * rank, held);
    grad_A = torch::stable::empty_like(*lora_A);
    grad_B = torch::stable::empty_like(*lora_B);
  }
  Tensor grad_scale = device_empty(held, {0}, ScalarType::Float), held_z;
  if (needs_grad_scale) {
    STD_TORCH_CHECK(out_scale.has_value(), kOp, ": the gradient of out_scale is asked for, and it is None");
    held_z = checked_rows(kOp, "z", z, stack.all.outputs, stack.all.weight);
    STD_TORCH_CHECK(held_z.size(0) == rows && held_z.scalar_type() == type, kOp, ": z has ", held_z.size(0),
                    " rows of ", torch::headeronly::toString(held_z.scalar_type()), ", wanted ", rows, " of ",
                    torch::headeronly::toString(type));
    grad_scale = device_empty(held, {stack.experts, stack.all.outputs}, ScalarType::Float);
  }
  if (rows == 0 || stack.all.outputs == 0 || stack.all.inputs == 0) {
    if (rank > 0) {
      torch::stable::fill_(grad_A, 0.0);
      torch::stable::fill_(grad_B, 0.0);
      torch::stable::fill_(grad_scale, 0.0);
    }
    if (needs_grad_x) grad_x = device_zeros(held, {rows, stack.all.inputs}, type);
    return {grad_x, grad_A, grad_B, grad_scale};
  }
  const RowRuns runs = row_runs(kOp, ends, rows);
  if (rank == 0) {
    if (needs_grad_x) grad_x = experts_product(held_grad, stack, ends, runs, false, nullptr);
    return {grad_x, grad_A, grad_B, grad_scale};
  }

  StackSplitter splitter(held, type, stack.experts, &ends);
  const Tensor* g = adapters.out_scale.has_value() ? &*adapters.out_scale : nullptr;
  const HeldTerms b = splitter.right_of_pass(*adapters.lora_B, true, adapters.padded, g);
  HeldTerms a;
  if (needs_grad_x) a = splitter.right_of_product(*adapters.lora_A, true, adapters.padded);
  splitter.run();
  PassInput over_grad = dense_input(held_grad), over_x = dense_input(held, &adapters.scale);
  over_grad.runs = over_x.runs = &runs;

  const PassSums p = rank_pass(over_grad, &b, nullptr);
  const HeldTerms p_transposed = pass_terms(held, adapters.padded, runs.padded_rows());
  HeldTerms p_terms;
  RowsWanted of_p;
  of_p.partial = &p.rows;
  // The terms of P contain dropout's factor 1/(1-p), which both dA and dX need.
  of_p.after = scaling * adapters.divided();
  of_p.transposed = &p_transposed;
  if (needs_grad_x) {
    p_terms = left_terms(held, runs.padded_rows(), adapters.padded, type);
    of_p.terms = &p_terms;
  }
  make_rows(runs, adapters, of_p);
  const Tensor held_s = as_contiguous(s);
  const HeldTerms s_transposed = pass_terms(held, adapters.padded, runs.padded_rows());
  RowsWanted of_s;
  of_s.given = &held_s;
  of_s.transposed = &s_transposed;
  make_rows(runs, adapters, of_s);

  const PassSums for_b = rank_pass(over_grad, nullptr, &s_transposed);
  PassWants mask;
  mask.mask = needs_grad_x;  // the product for dX reads the bits of dropout's mask
  const PassSums for_a = rank_pass(over_x, nullptr, &p_transposed, mask);
  reduce_stacks(runs, adapters, {{&for_a.columns, &grad_A, 2, 1.0, nullptr}, {&for_b.columns, &grad_B, 1, scaling, g}});
  if (g != nullptr)
    held_grad = scaled_rows(held_grad, needs_grad_scale ? &held_z : nullptr, *g, runs, needs_grad_x, grad_scale);
  if (needs_grad_x) {
    const LowRank low_rank{&p_terms, &a, &for_a.kept, &adapters.scale};
    grad_x = experts_product(held_grad, stack, ends, runs, false, &low_rank);
  }
  return {grad_x, grad_A, grad_B, grad_scale};
}

Tensor dora_experts_weight_norm_cuda(const Tensor& weight, const std::optional<Tensor>& part1,
                                     const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                     const std::optional<Tensor>& part4, int64_t layout,
                                     const std::vector<int64_t>& shape, const std::optional<Tensor>& offsets,
                                     const Tensor& lora_A, const Tensor& lora_B, double scaling, ScalarType type) {
  constexpr const char* kOp = "dora_experts_weight_norm";
  const DeviceStack stack = checked_stack(kOp, weight, {part1, part2, part3, part4}, layout, shape, type);
  const StackAdapters adapters = checked_adapters(kOp, stack, lora_A, lora_B, std::nullopt, scaling, 0.0, std::nullopt);
  const Tensor& held = stack.all.weight;
  const Tensor norm = device_empty(held, {stack.experts, stack.all.outputs}, ScalarType::Float);
  if (norm.numel() == 0) return norm;
  std::optional<Tensor> ends;
  if (offsets.has_value()) ends = checked_ends(kOp, *offsets, stack);
  // The terms are split as for a float32 result, because the norm is float32 for each dtype of W.
  StackSplitter splitter(held, ScalarType::Float, stack.experts, ends.has_value() ? &*ends : nullptr);
  const HeldTerms b = splitter.left_of_product(*adapters.lora_B, adapters.padded);
  const HeldTerms a = splitter.right_of_product(*adapters.lora_A, true, adapters.padded);
  splitter.run();
  Launcher launcher(held);
  StackNorm work{};
  work.weight = stack_view(launcher, stack, true);
  work.left = read_terms(launcher, b);
  work.right = read_terms(launcher, a);
  work.left_stride = terms_stride(b);
  work.right_stride = terms_stride(a);
  work.ends = launcher.in<int64_t>(ends);
  work.scaling = static_cast<float>(scaling);
  work.outputs = stack.all.outputs;
  work.inputs = stack.all.inputs;
  work.norm = launcher.scratch<float>(norm);
  const StackView& view = work.weight;
  // The kernel counts the elements of an expert's NF4 weight in 32 bits.
  const bool along = stack.all.is_nf4()
                         ? work.outputs * work.inputs < UINT32_MAX
                         : view.by_inner == 1 && multiple(view.by_column, kVector) && multiple(view.by_expert, kVector);
  const bool whole = along && multiple(work.inputs, kVector) && work.inputs < kMaxRankColumns && aligned(held, 16);
  with_type(type, [&](auto zero) {
    launch_experts_norm<decltype(zero)>(launcher, work, stack.all.is_nf4(), whole, stack.experts);
  });
  return norm;
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("lora_experts", PEFT_EXT_CUDA_BOX(&peft_ext::lora_experts_cuda));
  m.impl("lora_experts_backward", PEFT_EXT_CUDA_BOX(&peft_ext::lora_experts_backward_cuda));
  m.impl("dora_experts_weight_norm", PEFT_EXT_CUDA_BOX(&peft_ext::dora_experts_weight_norm_cuda));
}
