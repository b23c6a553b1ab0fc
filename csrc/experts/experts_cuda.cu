// A mixture's linear layers on a GPU: rows sorted by expert, each against its own expert's weight and adapter. What
// runs, each in launches that do not depend on how many experts there are, and none that waits for the offsets:
//
//   forward:   tables of the rows (row_runs); terms of all A_e, B_e (stacks); S: one pass over x; Y: one product, which
//              S B_eᵀ and b_e join in shared memory (product)
//   backward:  the tables; terms; P = s dY B_e; dB_e = dYᵀ S; dA_e = x̃ᵀ P; dX: one product, which mask ∘ (P A_e) joins
//
// Of many rows an expert and dense bfloat16 weights the product is PyTorch's own, where it has one for all experts, and
// the rest comes onto it.
#include <array>
#include <tuple>

#include "experts/cuda/product_call.cuh"
#include "experts/cuda/stacks.cuh"
#include "linear/cuda/passes.cuh"
#include "linear/cuda/rank_plan.cuh"

namespace peft_ext {
namespace {

// Rows an expert, in the mean, from which on the product is bound by arithmetic, and PyTorch's reads each operand less
// often than tiles of 64 x 128 do.
constexpr int64_t kManyRows = 128;

// The experts' weights: dense [E, N, K] of any strides, or NF4, each expert's packed for itself, one after the other.
struct DeviceStack {
  DeviceWeight all;  // the sizes of one; a dense weight is [E, N, K]
  int64_t experts = 0;
};

DeviceStack checked_stack(const char* op, const Tensor& weight, const std::optional<Tensor>& absmax,
                          const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                          const std::optional<Tensor>& nested_offset, int64_t blocksize,
                          const std::vector<int64_t>& shape, ScalarType type) {
  STD_TORCH_CHECK(on_device(weight), op, ": weight is not on a CUDA device");
  STD_TORCH_CHECK(shape.size() == 3, op, ": weight has ", shape.size(), " dimensions, wanted [E, N, K]");
  if (absmax.has_value()) {
    return {nf4_weights(op, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape[0], shape[1],
                        shape[2]),
            shape[0]};
  }
  STD_TORCH_CHECK(weight.dim() == 3 && weight.size(0) == shape[0] && weight.size(1) == shape[1] &&
                      weight.size(2) == shape[2] && weight.scalar_type() == type,
                  op, ": weight is ", torch::headeronly::toString(weight.scalar_type()), " with ", weight.numel(),
                  " elements, wanted ", torch::headeronly::toString(type), " [", shape[0], ", ", shape[1], ", ",
                  shape[2], "]");
  DeviceStack held;
  held.all.weight = weight;
  held.all.outputs = shape[1];
  held.all.inputs = shape[2];
  held.experts = shape[0];
  return held;
}

struct StackAdapters {
  std::optional<Tensor> lora_A, lora_B;  // [E, R, K], [E, N, R], of any strides
  DeviceAdapter scale;                   // scaling, dropout_p and the seed alone
  int64_t rank = 0, padded = 0;

  double divided() const { return scale.seed.has_value() ? 1.0 / (1.0 - scale.dropout_p) : 1.0; }
};

StackAdapters checked_adapters(const char* op, const DeviceStack& stack, const std::optional<Tensor>& lora_A,
                               const std::optional<Tensor>& lora_B, double scaling, double dropout_p,
                               const std::optional<Tensor>& seed) {
  StackAdapters held;
  held.scale.scaling = scaling;
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), op, ": of lora_A and lora_B one is None");
  if (!lora_A.has_value()) return held;
  const Tensor &a = *lora_A, &b = *lora_B;
  check_matrix(op, "lora_A", a, stack.all.weight);
  check_matrix(op, "lora_B", b, stack.all.weight);
  STD_TORCH_CHECK(a.dim() == 3 && a.size(0) == stack.experts && a.size(1) > 0 && a.size(2) == stack.all.inputs, op,
                  ": lora_A has ", a.numel(), " elements, wanted [", stack.experts, ", R, ", stack.all.inputs, "]");
  STD_TORCH_CHECK(
      b.dim() == 3 && b.size(0) == stack.experts && b.size(1) == stack.all.outputs && b.size(2) == a.size(1), op,
      ": lora_B has ", b.numel(), " elements, wanted [", stack.experts, ", ", stack.all.outputs, ", ", a.size(1), "]");
  held.lora_A = a;
  held.lora_B = b;
  held.rank = a.size(1);
  held.padded = padded_rank(held.rank);
  held.scale.dropout_p = dropout_p;
  held.scale.seed = device_seed(op, dropout_p, seed, stack.all.weight);
  return held;
}

// Rows [S, columns] in one piece.
Tensor checked_rows(const char* op, const char* argument, const Tensor& rows, int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(on_device(rows) && rows.get_device_index() == like.get_device_index(), op, ": ", argument,
                  " is on another device than weight, wanted cuda:", like.get_device_index());
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == columns, op, ": ", argument, " has ", rows.numel(),
                  " elements in ", rows.dim(), " dimensions, wanted [S, ", columns, "]");
  check_kernel_dtype(op, argument, rows.scalar_type());
  return as_contiguous(rows);
}

Tensor checked_ends(const char* op, const Tensor& offsets, const DeviceStack& stack) {
  STD_TORCH_CHECK(on_device(offsets) && offsets.get_device_index() == stack.all.weight.get_device_index() &&
                      offsets.scalar_type() == ScalarType::Long && offsets.numel() == stack.experts,
                  op, ": offsets is ", torch::headeronly::toString(offsets.scalar_type()), " with ", offsets.numel(),
                  " elements, wanted Long with ", stack.experts, " on weight's device");
  return as_contiguous(offsets);
}

// --- terms of stacks

// The stacks of a call that become terms, in one launch.
class StackSplitter {
 public:
  StackSplitter(const Tensor& like, ScalarType type, const RowRuns& runs)
      : launcher_(like), like_(like), type_(type), runs_(runs) {
    splits_.first_tile = launcher_.in<int32_t>(runs.first_tile);
  }

  // F of a rank pass, [ranks, columns of D], or of the product, [columns of the result, ranks], of each expert: its
  // matrix or (transpose) that matrix's transpose.
  HeldTerms right_of_pass(const Tensor& stack, bool transpose, int64_t padded) {
    const int64_t inner = stack.size(transpose ? 1 : 2);
    const bool one = type_ == ScalarType::BFloat16 && stack.scalar_type() == type_;
    return add(grouped_A_terms(like_, runs_.experts, padded, inner, one), stack, transpose);
  }
  HeldTerms right_of_product(const Tensor& stack, bool transpose, int64_t padded) {
    const int64_t outer = stack.size(transpose ? 2 : 1);
    return add(grouped_B_terms(like_, runs_.experts, padded, outer, false, type_), stack, transpose);
  }
  void run() const { launcher_(split_stacks_kernel, {blocks_, runs_.experts, count_}, kSplitThreads, splits_); }

 private:
  HeldTerms add(const HeldTerms& held, const Tensor& stack, bool transpose) {
    StackSplit& work = splits_.work[count_++];
    work.in = launcher_.in<void>(stack);
    work.type = dtype_of(stack.scalar_type());
    work.outer = stack.size(transpose ? 2 : 1);
    work.inner = stack.size(transpose ? 1 : 2);
    work.by_expert = stack.stride(0);
    work.outer_stride = stack.stride(transpose ? 2 : 1);
    work.inner_stride = stack.stride(transpose ? 1 : 2);
    work.out = write_terms(launcher_, held);
    work.out_stride = terms_stride(held) * 4;
    blocks_ = std::max(blocks_, ceil_div(held.terms.outer * held.terms.inner / 2, kSplitThreads));
    return held;
  }

  Launcher launcher_;
  const Tensor& like_;
  ScalarType type_;
  const RowRuns& runs_;
  StackSplits splits_{};
  int64_t count_ = 0, blocks_ = 0;
};

// --- rows

// What is wanted of small rows; see RunRows.
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

// A gradient [E, ., .] and which of its strides goes with the pass's columns.
struct StackGradient {
  const PartialSums* partial;
  const Tensor* out;
  int column_dim;
  double scale;
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

// The low-rank term of a product.
struct LowRank {
  const HeldTerms *left, *right;
  const std::optional<Tensor>* kept = nullptr;
  const DeviceAdapter* dropout = nullptr;  // where the term is dropped
};

bool multiple(int64_t size, int64_t of) { return size % of == 0; }

// Whether PyTorch has one product for all experts that takes less than experts_product_kernel does.
bool takes_grouped_mm(const Tensor& left, const DeviceStack& stack) {
  if (stack.all.is_nf4() || left.scalar_type() != ScalarType::BFloat16 || left.size(0) < kManyRows * stack.experts)
    return false;
#ifndef PEFT_EXT_EMULATE_CUDA
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, left.get_device_index()));
  if (major < 9) return false;
#endif
  const Tensor& weight = stack.all.weight;
  const bool along = weight.stride(2) == 1, across = weight.stride(1) == 1;
  return (along || across) && multiple(weight.stride(along ? 1 : 2), kVector) && multiple(weight.stride(0), kVector) &&
         multiple(stack.all.outputs, kVector) && multiple(stack.all.inputs, kVector) && aligned(weight, 16) &&
         aligned(left, 16);
}

// [rows, N or K] = left W_eᵀ, or left W_e.
Tensor grouped_mm(const Tensor& left, const DeviceStack& stack, const Tensor& ends, bool transpose) {
  const Tensor right = transpose ? torch::stable::transpose(stack.all.weight, 1, 2) : stack.all.weight;
  const Tensor ends_32 = as_type(ends, ScalarType::Int);
  std::array<StableIValue, 5> arguments{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                        torch::stable::detail::from(std::optional<Tensor>(ends_32)),
                                        torch::stable::detail::from(std::optional<Tensor>()),
                                        torch::stable::detail::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_grouped_mm", "", arguments.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(arguments[0]);
}

// left W_eᵀ, or left W_e, and the low-rank term and the bias, where there are.
Tensor experts_product(const Tensor& left, const DeviceStack& stack, const Tensor& ends, const RowRuns& runs,
                       bool transpose, const LowRank* low_rank, const std::optional<Tensor>& bias) {
  const int64_t rows = left.size(0), columns = transpose ? stack.all.outputs : stack.all.inputs;
  const ScalarType type = left.scalar_type();
  const bool grouped = takes_grouped_mm(left, stack);
  const Tensor out = grouped ? grouped_mm(left, stack, ends, transpose) : device_empty(left, {rows, columns}, type);
  Launcher launcher(left);
  ExpertsProduct work{};
  work.out = grouped ? launcher.out<void>(out) : launcher.scratch<void>(out);
  work.columns = columns;
  work.inner = left.size(1);
  work.tiles = read_tiles(launcher, runs);
  bool whole = multiple(columns, kVector) && aligned(out, 16);
  if (bias.has_value()) {
    work.bias = launcher.in<void>(*bias);
    whole = whole && aligned(*bias, 16);
  }
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
  StackView& view = work.weight;
  whole = whole && multiple(work.inner, kVector) && work.inner < kMaxRankColumns && aligned(left, 16) &&
          aligned(stack.all.weight, 16);
  if (stack.all.is_nf4()) {
    view.nf4 = nf4_view(launcher, stack.all);
    view.codes = stack.all.codes();
    view.scales = stack.all.scales();
    view.groups = ceil_div(view.scales, kNestedBlock);
    view.by_column = transpose ? stack.all.inputs : 1;
    view.by_inner = transpose ? 1 : stack.all.inputs;
    // A thread's 32 elements have one scale, and lie on 16 bytes.
    whole = whole && multiple(stack.all.inputs, kSmallestBlock);
  } else {
    view.dense = launcher.in<void>(stack.all.weight);
    view.by_expert = stack.all.weight.stride(0);
    view.by_column = stack.all.weight.stride(transpose ? 1 : 2);
    view.by_inner = stack.all.weight.stride(transpose ? 2 : 1);
    const bool one = view.by_column == 1 || view.by_inner == 1;
    whole = whole && one && multiple(view.by_expert, kVector) &&
            multiple(view.by_inner == 1 ? view.by_column : view.by_inner, kVector);
  }
  if (whole) variant.order = view.by_inner == 1 ? StackOrder::kAlong : StackOrder::kAcross;
  with_type(type, [&](auto zero) { launch_experts_product<decltype(zero)>(launcher, work, variant); });
  return out;
}

// --- operators

std::tuple<Tensor, Tensor> lora_experts_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
                                             const std::optional<Tensor>& nested_absmax,
                                             const std::optional<Tensor>& nested_code,
                                             const std::optional<Tensor>& nested_offset, int64_t blocksize,
                                             const std::vector<int64_t>& shape, const std::optional<Tensor>& bias,
                                             const Tensor& offsets, const std::optional<Tensor>& lora_A,
                                             const std::optional<Tensor>& lora_B, double scaling, double dropout_p,
                                             const std::optional<Tensor>& seed) {
  constexpr const char* kOp = "lora_experts";
  const ScalarType type = x.scalar_type();
  const DeviceStack stack =
      checked_stack(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape, type);
  const Tensor held = checked_rows(kOp, "x", x, stack.all.inputs, stack.all.weight);
  const StackAdapters adapters = checked_adapters(kOp, stack, lora_A, lora_B, scaling, dropout_p, seed);
  const Tensor ends = checked_ends(kOp, offsets, stack);
  std::optional<Tensor> held_bias;
  if (bias.has_value()) {
    check_matrix(kOp, "bias", *bias, x);
    STD_TORCH_CHECK(bias->numel() == stack.experts * stack.all.outputs && bias->scalar_type() == type, kOp,
                    ": bias is ", torch::headeronly::toString(bias->scalar_type()), " with ", bias->numel(),
                    " elements, wanted ", torch::headeronly::toString(type), " [", stack.experts, ", ",
                    stack.all.outputs, "]");
    held_bias = as_contiguous(*bias);
  }
  const int64_t rows = held.size(0);
  const Tensor s = adapters.rank > 0 ? device_empty(held, {rows, adapters.rank}, ScalarType::Float)
                                     : device_empty(held, {0}, ScalarType::Float);
  if (rows == 0 || stack.all.outputs == 0) return {device_empty(held, {rows, stack.all.outputs}, type), s};
  const RowRuns runs = row_runs(kOp, ends, rows);
  if (adapters.rank == 0) return {experts_product(held, stack, ends, runs, true, nullptr, held_bias), s};

  StackSplitter splitter(held, type, runs);
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
  return {experts_product(held, stack, ends, runs, true, &low_rank, held_bias), s};
}

std::tuple<Tensor, Tensor, Tensor> lora_experts_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& nested_offset, int64_t blocksize, const std::vector<int64_t>& shape,
    const Tensor& offsets, const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, const Tensor& s,
    double scaling, double dropout_p, const std::optional<Tensor>& seed, bool needs_grad_x) {
  constexpr const char* kOp = "lora_experts_backward";
  const ScalarType type = x.scalar_type();
  const DeviceStack stack =
      checked_stack(kOp, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, shape, type);
  const Tensor held = checked_rows(kOp, "x", x, stack.all.inputs, stack.all.weight);
  const Tensor held_grad = checked_rows(kOp, "grad", grad, stack.all.outputs, stack.all.weight);
  const StackAdapters adapters = checked_adapters(kOp, stack, lora_A, lora_B, scaling, dropout_p, seed);
  const Tensor ends = checked_ends(kOp, offsets, stack);
  const int64_t rows = held.size(0), rank = adapters.rank;
  STD_TORCH_CHECK(held_grad.size(0) == rows && held_grad.scalar_type() == type, kOp, ": grad has ", held_grad.size(0),
                  " rows of ", torch::headeronly::toString(held_grad.scalar_type()), ", wanted ", rows, " of ",
                  torch::headeronly::toString(type));
  Tensor grad_x = device_empty(held, {0}, type), grad_A = device_empty(held, {0}, ScalarType::Float), grad_B = grad_A;
  if (rank > 0) {
    STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float && s.numel() == rows * rank, kOp, ": s has ", s.numel(),
                    " elements, wanted Float [", rows, ", ", rank, "]");
    grad_A = torch::stable::empty_like(*lora_A);
    grad_B = torch::stable::empty_like(*lora_B);
  }
  if (rows == 0 || stack.all.outputs == 0 || stack.all.inputs == 0) {
    if (rank > 0) {
      torch::stable::fill_(grad_A, 0.0);
      torch::stable::fill_(grad_B, 0.0);
    }
    if (needs_grad_x) grad_x = device_zeros(held, {rows, stack.all.inputs}, type);
    return {grad_x, grad_A, grad_B};
  }
  const RowRuns runs = row_runs(kOp, ends, rows);
  if (rank == 0) {
    if (needs_grad_x) grad_x = experts_product(held_grad, stack, ends, runs, false, nullptr, std::nullopt);
    return {grad_x, grad_A, grad_B};
  }

  StackSplitter splitter(held, type, runs);
  const HeldTerms b = splitter.right_of_pass(*adapters.lora_B, true, adapters.padded);
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
  of_p.after = scaling * adapters.divided();  // what dropout divides by is in P, for both of its products
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
  mask.mask = true;
  const PassSums for_a = rank_pass(over_x, nullptr, &p_transposed, mask);
  reduce_stacks(runs, adapters, {{&for_a.columns, &grad_A, 2, 1.0}, {&for_b.columns, &grad_B, 1, scaling}});
  if (needs_grad_x) {
    const LowRank low_rank{&p_terms, &a, &for_a.kept, &adapters.scale};
    grad_x = experts_product(held_grad, stack, ends, runs, false, &low_rank, std::nullopt);
  }
  return {grad_x, grad_A, grad_B};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("lora_experts", TORCH_BOX(&peft_ext::lora_experts_cuda));
  m.impl("lora_experts_backward", TORCH_BOX(&peft_ext::lora_experts_backward_cuda));
}
