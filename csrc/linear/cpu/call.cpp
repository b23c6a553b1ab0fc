// Checks the arguments of a call of the adapted layer, and makes the structures that all ways of computing the layer
// use. See call.h.
#include "linear/cpu/call.h"

namespace peft_ext {

LinearSizes checked_sizes(const char* op, int64_t tokens, int64_t columns, const FrozenWeight& weight,
                          const Adapter& adapter) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  STD_TORCH_CHECK(columns == k, op, ": x has ", columns, " columns, wanted ", k);
  const int64_t rank = adapter.rank();
  if (adapter.lora_A.has_value()) {
    STD_TORCH_CHECK(adapter.lora_A->dim() == 2 && adapter.lora_A->size(1) == k && rank > 0, op, ": lora_A has ",
                    adapter.lora_A->numel(), " elements, wanted [R, ", k, "] of a rank of 1 or more");
    STD_TORCH_CHECK(adapter.lora_B.has_value() && adapter.lora_B->dim() == 2 && adapter.lora_B->size(0) == n &&
                        adapter.lora_B->size(1) == rank,
                    op, ": lora_B is not [", n, ", ", rank, "]");
  }
  return {tokens, k, n, rank};
}

LinearSizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter) {
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x has 0 columns, wanted ", weight.in_features());
  return checked_sizes(op, rows_of(x), x.size(x.dim() - 1), weight, adapter);
}

void check_bias(const char* op, const std::optional<Tensor>& bias, const LinearSizes& size) {
  if (bias.has_value())
    STD_TORCH_CHECK(bias->numel() == size.out, op, ": bias has ", bias->numel(), " elements, wanted ", size.out);
}

Expand finishing(const ForwardCall& f) {
  Expand work;
  work.y = f.out.y.mutable_data_ptr();
  work.z = f.want_z ? f.out.z.mutable_data_ptr() : nullptr;
  work.dtype = f.dtype();
  work.columns = f.size.out;
  work.rank = f.size.rank;
  work.stride = round_up(f.size.out, kColumnStep);
  work.scale = floats(f.scale);
  (f.bias_inside ? work.bias_before : work.bias) = floats(f.bias);
  return work;
}

BackwardCall checked_backward(const char* op, const FrozenWeight& weight, const Adapter& adapter, const Tensor& grad,
                              const Tensor& held_x) {
  const LinearSizes size = checked_sizes(op, held_x, weight, adapter);
  const ScalarType type = held_x.scalar_type();
  STD_TORCH_CHECK(grad.numel() == size.tokens * size.out && grad.scalar_type() == type, op, ": grad has ", grad.numel(),
                  " elements of ", torch::headeronly::toString(grad.scalar_type()), ", wanted ", size.tokens * size.out,
                  " of ", torch::headeronly::toString(type));
  dtype_of(op, "x", held_x);
  return {op,
          weight,
          adapter,
          size,
          as_shape(as_contiguous(grad), {size.tokens, size.out}),
          as_shape(held_x, {size.tokens, size.in}),
          Tensor(),
          KeepBits(),
          false,
          Tensor(),
          nullptr};
}

Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (!seed.has_value()) return dropout;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p is ", p, ", wanted 0 <= p < 1");
  const Tensor held = as_contiguous(*seed);
  const int64_t* words = held.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.seed = static_cast<uint64_t>(words[0]);
  dropout.offset = static_cast<uint64_t>(words[1]);
  dropout.threshold = static_cast<uint32_t>(__builtin_nearbyint(p * 65536.0));
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

Adapter lora_adapter(const char* op, const Tensor& lora_A, const Tensor& lora_B,
                     const std::optional<Tensor>& rank_scale, double scaling, double dropout_p,
                     const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(0) > 0, op, ": lora_A has ", lora_A.numel(), " elements in ",
                  lora_A.dim(), " dimensions, wanted [R, K] with a rank of at least 1");
  Adapter adapter;
  adapter.lora_A = lora_A;
  adapter.lora_B = lora_B;
  adapter.rank_scale = rank_scale;
  adapter.scaling = scaling;
  adapter.dropout = make_dropout(op, dropout_p, seed);
  return adapter;
}

}  // namespace peft_ext
