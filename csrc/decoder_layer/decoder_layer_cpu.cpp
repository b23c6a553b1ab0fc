// A decoder layer of a transformer for few tokens on the CPU, without a gradient:
//
//   q, k, v = projections(norm₁(x));   the rotated k, and v, are written to the cache, after its keys and values;
//   h = x + o(attention(rotated q, all keys, all values));   y = h + down(act(gate(norm₂(h))) ∘ up(norm₂(h)))
//
// Most steps run the CPU code of an operator (rms_norm, lora_linears, rotary_embedding,
// scaled_dot_product_attention, gated_activation), and give the same bits as a call of that operator. The copy of v to
// the cache and the two additions are computed in this file. One call from Python runs all steps of the layer.
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "activations/operators.h"
#include "attention/operators.h"
#include "common/api.h"
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "norm/operators.h"
#include "rotary/operators.h"
#include "siblings/layers.h"

namespace peft_ext {
namespace {

constexpr const char* kOp = "decoder_layer";
constexpr size_t kLayers = 7;  // number of linear layers: q, k, v, o, gate, up, down
constexpr size_t kNorms = 2, kLayerSizes = 4, kLayerNumbers = 2;
// Number of entries at the start of the list `sizes`: the activation, and whether the norms round before they multiply
// by the weight.
constexpr size_t kOwnSizes = 2;
// Number of entries at the start of the list `numbers`: eps of each norm, the offset of the norms' weights, and the
// scale of attention.
constexpr size_t kOwnNumbers = 4;

// The list arguments of decoder_layer for one decoder layer. To convert these lists from Python takes as long as to
// compute a small decoder layer.
struct Lists {
  std::vector<Tensor> tensors;
  std::vector<int64_t> sizes;
  std::vector<double> numbers;
};

using Plans = std::unordered_map<int64_t, std::shared_ptr<const Lists>>;

std::mutex plans_mutex;

// The lists that kept_lists keeps, by their plan number. The map is never destroyed, because when the process ends, the
// Python objects that belong to the tensors are already gone.
Plans& plans() {
  static Plans& held = *new Plans;
  return held;
}

// Returns the given lists, and keeps them under the number `plan` if `plan` is not 0. If no tensors are given, returns
// the lists that are kept under `plan`.
std::shared_ptr<const Lists> kept_lists(int64_t plan, Lists given) {
  // Replaced lists are destroyed after plans_mutex is unlocked: to release a tensor may take Python's global lock,
  // which another thread holds while it waits for plans_mutex in peft_ext_forget_plan.
  std::shared_ptr<const Lists> replaced;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  if (!given.tensors.empty()) {
    auto held = std::make_shared<const Lists>(std::move(given));
    if (plan != 0) replaced = std::exchange(plans()[plan], held);
    return held;
  }
  const auto found = plans().find(plan);
  STD_TORCH_CHECK(found != plans().end(), kOp, ": no lists are given, and none are kept under plan ", plan);
  return found->second;
}

Tensor strided(const Tensor& tensor, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
               int64_t offset) {
  AtenTensorHandle out = nullptr;  // the offset is relative to the tensor's storage offset
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(shape.size()), shape.data(),
                                                        strides.data(), offset, &out));
  return Tensor(out);
}

// Returns y [B, T, H · D] as [B, H, T, D].
Tensor heads_of(const Tensor& y, int64_t size) {
  const int64_t batch = y.size(0), tokens = y.size(1), columns = y.size(2);
  return strided(y, {batch, columns / size, tokens, size}, {tokens * columns, size, columns, 1}, 0);
}

// Returns the tokens [first, first + count) of the cached keys or values [B, H, capacity, D].
Tensor tokens_of(const Tensor& held, int64_t first, int64_t count) {
  return strided(held, {held.size(0), held.size(1), count, held.size(3)},
                 {held.stride(0), held.stride(1), held.stride(2), 1}, first * held.stride(2));
}

// Copies v to `to`, both [B, H, T, D] with contiguous rows of elements of two or four bytes.
void copy_heads(const Tensor& v, const Tensor& to) {
  const size_t element = v.scalar_type() == ScalarType::Float ? 4 : 2, row = static_cast<size_t>(v.size(3)) * element;
  const char* from = static_cast<const char*>(v.const_data_ptr());
  char* into = static_cast<char*>(to.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(element);
  for (int64_t b = 0; b < v.size(0); ++b)
    for (int64_t h = 0; h < v.size(1); ++h)
      for (int64_t t = 0; t < v.size(2); ++t)
        memcpy(into + (b * to.stride(0) + h * to.stride(1) + t * to.stride(2)) * bytes,
               from + (b * v.stride(0) + h * v.stride(1) + t * v.stride(2)) * bytes, row);
}

// Returns a + b, rounded once. a and b are contiguous, of one shape and dtype.
Tensor sum_of(const Tensor& a, const Tensor& b) {
  const Tensor sum = empty({a.sizes().begin(), a.sizes().end()}, a.scalar_type());
  with_dtype(dtype_of(kOp, "x", a), [&](auto zero) {
    using T = decltype(zero);
    const T *one = static_cast<const T*>(a.const_data_ptr()), *other = static_cast<const T*>(b.const_data_ptr());
    T* to = static_cast<T*>(sum.mutable_data_ptr());
    const int64_t count = a.numel();
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(to_float(one[i]) + to_float(other[i]));
  });
  return sum;
}

Tensor decoder_layer_cpu(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> mask, Tensor keys, Tensor values,
                         int64_t past, std::vector<Tensor> given_tensors, std::vector<int64_t> given_sizes,
                         std::vector<double> given_numbers, int64_t plan) {
  const auto lists = kept_lists(plan, {std::move(given_tensors), std::move(given_sizes), std::move(given_numbers)});
  const auto& [tensors, sizes, numbers] = *lists;
  STD_TORCH_CHECK(tensors.size() >= kNorms && sizes.size() == kOwnSizes + kLayers * kLayerSizes &&
                      numbers.size() == kOwnNumbers + kLayers * kLayerNumbers,
                  kOp, ": tensors, sizes or numbers are not those of two norms and ", kLayers, " layers");
  STD_TORCH_CHECK(x.dim() == 3 && keys.dim() == 4 && values.dim() == 4, kOp,
                  ": x is not [B, T, K], or keys or values are not [B, H, capacity, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), size = keys.size(3);
  for (const Tensor* held : {&keys, &values})
    STD_TORCH_CHECK(held->size(0) == batch && held->size(1) == keys.size(1) && held->size(3) == size && size > 0 &&
                        held->stride(3) == 1 && held->scalar_type() == x.scalar_type() && past >= 0 &&
                        past <= held->size(2) - tokens,
                    kOp, ": keys or values have no room for the tokens of x behind ", past, " tokens");
  const std::vector<Layer> layers =
      lora_layers(kOp, {tensors.begin() + kNorms, tensors.end()}, {sizes.begin() + kOwnSizes, sizes.end()},
                  {numbers.begin() + kOwnNumbers, numbers.end()});
  const auto of = [&](size_t first, size_t last) {
    const auto begin = layers.begin();
    return std::vector<Layer>(begin + static_cast<int64_t>(first), begin + static_cast<int64_t>(last));
  };
  const int64_t hidden = x.size(2), width = layers[1].weight.out_features();
  STD_TORCH_CHECK(width == keys.size(1) * size && layers[2].weight.out_features() == width &&
                      layers[0].weight.out_features() % size == 0 && layers[3].weight.out_features() == hidden &&
                      layers[6].weight.out_features() == hidden,
                  kOp, ": the layers do not give the heads of the keys, or the columns of x");
  const bool rounds = sizes[1] != 0;
  const Tensor residual = as_contiguous(x);
  // If rms_norm_cpu rounds before it multiplies by a weight of another dtype than x, its result is float32, which
  // decoder_layer does not support.
  for (size_t i = 0; i < kNorms; ++i)
    STD_TORCH_CHECK(!rounds || tensors[i].scalar_type() == x.scalar_type(), kOp,
                    ": a norm's weight is not of x's type");
  const Tensor normed = std::get<0>(rms_norm_cpu(residual, tensors[0], numbers[0], numbers[2], rounds));
  const std::vector<AdaptedForward> projected = adapted_forwards(kOp, normed, of(0, 3));
  const Tensor q = heads_of(projected[0].y, size);
  const Tensor rotated = like_with_whole_rows(q);
  rotate_heads(kOp, q, heads_of(projected[1].y, size), cos, sin, rotated, tokens_of(keys, past, tokens), false);
  copy_heads(heads_of(projected[2].y, size), tokens_of(values, past, tokens));
  const Tensor attended = std::get<0>(scaled_dot_product_attention_cpu(rotated, tokens_of(keys, 0, past + tokens),
                                                                       tokens_of(values, 0, past + tokens), mask, false,
                                                                       numbers[3], 0.0, std::nullopt, std::nullopt));
  const int64_t columns = layers[0].weight.out_features();
  const Tensor rows = strided(attended, {batch, tokens, columns}, {tokens * columns, columns, 1}, 0);
  const Tensor h = sum_of(residual, adapted_forwards(kOp, rows, of(3, 4))[0].y);
  const Tensor second = std::get<0>(rms_norm_cpu(h, tensors[1], numbers[1], numbers[2], rounds));
  const std::vector<AdaptedForward> inner = adapted_forwards(kOp, second, of(4, 6));
  const Tensor gated = gated_activation_cpu(inner[0].y, inner[1].y, sizes[0]);
  return sum_of(h, adapted_forwards(kOp, gated, of(6, 7))[0].y);
}

}  // namespace
}  // namespace peft_ext

void peft_ext_forget_plan(int64_t plan) {
  std::shared_ptr<const peft_ext::Lists> forgotten;  // destroyed after plans_mutex is unlocked
  const std::lock_guard<std::mutex> lock(peft_ext::plans_mutex);
  const auto found = peft_ext::plans().find(plan);
  if (found == peft_ext::plans().end()) return;
  forgotten = std::move(found->second);
  peft_ext::plans().erase(found);
}

PEFT_EXT_OPERATORS(CPU, m) { m.impl("decoder_layer", PEFT_EXT_CPU_BOX(&peft_ext::decoder_layer_cpu)); }
