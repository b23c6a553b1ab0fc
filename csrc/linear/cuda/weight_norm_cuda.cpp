// Computes the norm of each row of W + s B A, and the gradients of A and B through the norm. The formulas are in
// weight_norm.cuh.
#include "linear/cuda/passes.cuh"
#include "linear/cuda/weight_norm.cuh"

namespace peft_ext {
namespace {

// Returns the bfloat16 terms of a matrix [ranks, columns], which is the factor F of a rank pass over a matrix of dtype
// `type`.
HeldTerms split_right(const Tensor& matrix, ScalarType type) {
  Splitter splitter(matrix, type);
  const HeldTerms held = splitter.right_of_pass(matrix, false);
  splitter.run();
  return held;
}

// Checks that lora_A is [R, K] and lora_B is [N, R], on the weight's device.
void check_adapter(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B) {
  check_matrix(op, "lora_A", lora_A, weight.weight);
  check_matrix(op, "lora_B", lora_B, weight.weight);
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(0) > 0 && lora_A.size(1) == weight.inputs, op, ": lora_A has ",
                  lora_A.numel(), " elements, wanted [R, ", weight.inputs, "] of a rank of 1 or more");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == weight.outputs && lora_B.size(1) == lora_A.size(0), op,
                  ": lora_B is not [", weight.outputs, ", ", lora_A.size(0), "]");
}

// Returns A Aᵀ [R, R] float32.
Tensor gram(const Tensor& a) {
  const HeldTerms terms = split_right(a, a.scalar_type());
  const int64_t rank = a.size(0);
  const Tensor out = device_empty(a, {rank, rank}, ScalarType::Float);
  Reduced wanted;
  wanted.plain = &out;
  reduce(rank_pass(dense_input(a), &terms, nullptr).rows, rank, wanted);
  return out;
}

// Returns a weight that a rank pass can read: a contiguous dense weight, or an NF4 weight. A weight in another packed
// format is decoded to `type`, and the decoded copy, of N K elements, exists during the call.
DeviceWeight pass_weight(const DeviceWeight& weight, ScalarType type) {
  if (weight.is_nf4()) return weight;
  DeviceWeight held;
  held.weight = as_contiguous(dense_weight(weight, type));
  held.outputs = weight.outputs;
  held.inputs = weight.inputs;
  return held;
}

}  // namespace

DeviceNorm weight_norm(const char* op, const DeviceWeight& weight, const Tensor& lora_A, const Tensor& lora_B,
                       double scaling, ScalarType type) {
  check_adapter(op, weight, lora_A, lora_B);
  const int64_t rows = weight.outputs, rank = lora_A.size(0);
  DeviceNorm out;
  out.norm = device_empty(weight.weight, {rows}, ScalarType::Float);
  out.u = device_empty(weight.weight, {rows, rank}, ScalarType::Float);
  if (rows == 0 || weight.inputs == 0) {
    torch::stable::fill_(out.norm, 0.0);
    torch::stable::fill_(out.u, 0.0);
    return out;
  }
  const DeviceWeight held = pass_weight(weight, type);
  const Tensor a = as_contiguous(lora_A), b = as_type(as_contiguous(lora_B), ScalarType::Float);
  // The passes over W and over A multiply by the same factor Aᵀ, and one launch reduces the sums of both passes.
  const HeldTerms terms = split_right(a, type);
  const PassSums sums = rank_pass(weight_input(held, type), &terms, nullptr, PassWants{true});
  const PassSums gram_sums = rank_pass(dense_input(a), &terms, nullptr);
  const Tensor products = device_empty(a, {rank, rank}, ScalarType::Float);
  Reduced of_weight, of_a;
  of_weight.plain = &out.u;
  of_a.plain = &products;
  Reducer reducer(a);
  reducer.add(sums.rows, rank, of_weight);
  reducer.add(gram_sums.rows, rank, of_a);
  reducer.run();
  Launcher launcher(b);
  Norm work{};
  work.u = launcher.in<float>(out.u);
  work.squares = launcher.in<float>(sums.squares);
  work.chunks = sums.rows.chunks;
  work.padded_rows = sums.rows.padded_rows;
  work.products = launcher.in<float>(products);
  work.lora_B = launcher.in<float>(b);
  work.scaling = static_cast<float>(scaling);
  work.rows = rows;
  work.rank = rank;
  work.norm = launcher.scratch<float>(out.norm);
  launcher(dora_norm_kernel, ceil_div(rows, kNormRows), kNormThreads, work);
  return out;
}

DeviceNormGradient weight_norm_backward(const char* op, const Tensor& grad, const DeviceWeight& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, const Tensor& norm, const Tensor& u,
                                        double scaling, ScalarType type) {
  check_adapter(op, weight, lora_A, lora_B);
  const int64_t rows = weight.outputs, inputs = weight.inputs, rank = lora_A.size(0);
  check_tensor(op, "u", u, ScalarType::Float, rows * rank, weight.weight, "weight");
  if (rows == 0 || inputs == 0)
    return {device_zeros(lora_A, {rank, inputs}, lora_A.scalar_type()),
            device_zeros(lora_B, {rows, rank}, lora_B.scalar_type())};
  const DeviceWeight held = pass_weight(weight, type);
  const Tensor a = as_contiguous(lora_A), b = as_type(as_contiguous(lora_B), ScalarType::Float);
  const Tensor wide_a = as_type(a, ScalarType::Float);
  const Tensor held_grad = device_vector(op, "grad", grad, rows, weight.weight);
  const Tensor held_norm = device_vector(op, "norm", norm, rows, weight.weight), held_u = as_contiguous(u);
  const Tensor products = gram(a);
  const Tensor left = device_empty(b, {rows, rank}, ScalarType::Float);
  const Tensor grad_b = device_empty(b, {rows, rank}, ScalarType::Float);
  {
    Launcher launcher(b);
    Norm work{};
    work.u = launcher.in<float>(held_u);
    work.products = launcher.in<float>(products);
    work.lora_B = launcher.in<float>(b);
    work.scaling = static_cast<float>(scaling);
    work.rows = rows;
    work.rank = rank;
    work.norm = const_cast<float*>(launcher.in<float>(held_norm));
    work.grad = launcher.in<float>(held_grad);
    work.left = launcher.scratch<float>(left);
    work.grad_B = launcher.scratch<float>(grad_b);
    launcher(dora_norm_backward_kernel, ceil_div(rows, kNormRows), kNormThreads, work);
  }
  Splitter splitter(left, type);
  const HeldTerms c_b = splitter.left_of_pass(left, true);
  splitter.run();
  const Tensor outer = device_empty(b, {inputs, rank}, ScalarType::Float);
  const Tensor inner = device_empty(b, {rank, rank}, ScalarType::Float);
  const PassSums over_weight = rank_pass(weight_input(held, type), nullptr, &c_b);
  const PassSums over_b = rank_pass(dense_input(b), nullptr, &c_b);
  Reduced of_weight, of_b;
  of_weight.plain = &outer;
  of_b.plain = &inner;
  Reducer reducer(b);
  reducer.add(over_weight.columns, rank, of_weight);
  reducer.add(over_b.columns, rank, of_b);
  reducer.run();
  const Tensor grad_a = device_empty(b, {rank, inputs}, ScalarType::Float);
  Launcher launcher(grad_a);
  NormGradA work{};
  work.outer = launcher.in<float>(outer);
  work.inner = launcher.in<float>(inner);
  work.lora_A = launcher.in<float>(wide_a);
  work.scaling = static_cast<float>(scaling);
  work.rank = rank;
  work.inputs = inputs;
  work.grad_A = launcher.scratch<float>(grad_a);
  launcher(dora_norm_grad_A_kernel, {ceil_div(inputs, kNormThreads), rank}, kNormThreads, work);
  return {as_type(grad_a, lora_A.scalar_type()), as_type(grad_b, lora_B.scalar_type())};
}

}  // namespace peft_ext
