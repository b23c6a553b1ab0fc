// A decoder layer of a transformer for few tokens on the CPU, without a gradient:
//
//   q, k, v = projections(norm₁(x));   the rotated k, and v, are written to the cache, after its keys and values;
//   h = x + o(attention(rotated q, all keys, all values));   y = h + down(act(gate(norm₂(h))) ∘ up(norm₂(h)))
//
// Most steps run the CPU code of an operator (rms_norm, lora_linears, rotary_embedding,
// scaled_dot_product_attention, gated_activation), and give the same bits as a call of that operator. The copy of v to
// the cache and the two additions are computed in this file. One call from Python runs all steps of the layer.
#include <algorithm>
#include <memory>
#include <optional>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "activations/operators.h"
#include "attention/operators.h"
#include "common/api.h"
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/few_layers.h"
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

// What the kernels know of a tensor before they read its values.
struct TensorFacts {
  const void* data;
  ScalarType type;
  std::vector<int64_t> sizes;
  bool contiguous;

  explicit TensorFacts(const Tensor& of)
      : data(of.const_data_ptr()),
        type(of.scalar_type()),
        sizes(of.sizes().begin(), of.sizes().end()),
        contiguous(of.is_contiguous()) {}

  bool holds(const Tensor& of) const {
    const auto now = of.sizes();
    return of.const_data_ptr() == data && of.scalar_type() == type && of.is_contiguous() == contiguous &&
           std::equal(now.begin(), now.end(), sizes.begin(), sizes.end());
  }
};

// The linear layers of a decoder layer, checked and prepared for an input of one dtype, number of tokens and number of
// columns. Later calls use them again if the same tensors are still contiguous in the same memory: to check the layers
// takes a tenth of a small decoder layer's time. The values of the tensors are read in each call.
class PreparedLayers {
 public:
  // The layers that have one input: q, k and v; o; gate and up; down. The layers of a group are those from
  // kFirst[group] to kFirst[group + 1].
  enum Group : size_t { kProjections = 0, kOutput, kGateUp, kDown, kGroups };

  PreparedLayers(std::shared_ptr<const Lists> lists, const Tensor& x)
      : lists_(std::move(lists)),
        isa_(current_isa()),
        type_(x.scalar_type()),
        tokens_(rows_of(x)),
        columns_(x.size(2)) {
    const auto& [tensors, sizes, numbers] = *lists_;
    STD_TORCH_CHECK(tensors.size() >= kNorms && sizes.size() == kOwnSizes + kLayers * kLayerSizes &&
                        numbers.size() == kOwnNumbers + kLayers * kLayerNumbers,
                    kOp, ": tensors, sizes or numbers are not those of two norms and ", kLayers, " layers");
    layers_ = lora_layers(kOp, {tensors.begin() + kNorms, tensors.end()}, {sizes.begin() + kOwnSizes, sizes.end()},
                          {numbers.begin() + kOwnNumbers, numbers.end()});
    for (const Tensor& tensor : tensors) facts_.emplace_back(tensor);
    const int64_t columns[kGroups] = {columns_, outputs(0), columns_, outputs(4)};
    for (size_t group = 0; group < kGroups; ++group)
      prepared_.push_back(FewLayers::of(kOp, layers_.data() + kFirst[group], layers_.data() + kFirst[group + 1], type_,
                                        tokens_, columns[group]));
  }
  PreparedLayers(const PreparedLayers&) = delete;  // prepared_ refers to layers_
  PreparedLayers& operator=(const PreparedLayers&) = delete;

  // Returns whether a later call with the same lists may use these layers: no value was read and nothing was copied.
  bool may_be_kept() const {
    for (const TensorFacts& facts : facts_)
      if (!facts.contiguous) return false;
    for (const Layer& layer : layers_)
      if (layer.adapter.dropout.active) return false;
    return true;
  }

  // Returns whether these layers are those of the lists for x.
  bool fit(const Lists& lists, const Tensor& x) const {
    if (&lists != lists_.get() || current_isa() != isa_ || x.scalar_type() != type_ || rows_of(x) != tokens_ ||
        x.size(2) != columns_)
      return false;
    for (size_t i = 0; i < facts_.size(); ++i)
      if (!facts_[i].holds(lists.tensors[i])) return false;
    return true;
  }

  int64_t outputs(size_t layer) const { return layers_[layer].weight.out_features(); }

  // Returns Y of each layer of a group for a contiguous x.
  std::vector<Tensor> forward(Group group, const Tensor& x) const {
    std::vector<Tensor> found;
    const std::optional<FewLayers>& few = prepared_[group];
    if (!few.has_value()) {
      const std::vector<Layer> layers(layers_.data() + kFirst[group], layers_.data() + kFirst[group + 1]);
      for (const AdaptedForward& one : adapted_forwards(kOp, x, layers)) found.push_back(one.y);
      return found;
    }
    std::vector<FewLayers::Results> results;
    for (size_t layer = kFirst[group]; layer < kFirst[group + 1]; ++layer) {
      found.push_back(empty(with_last(x, outputs(layer)), type_));
      results.push_back({found.back().mutable_data_ptr(), nullptr, nullptr});
    }
    few->run(x.const_data_ptr(), results);
    return found;
  }

 private:
  static constexpr size_t kFirst[kGroups + 1] = {0, 3, 4, 6, kLayers};

  std::shared_ptr<const Lists> lists_;
  Isa isa_;
  ScalarType type_;
  int64_t tokens_, columns_;
  std::vector<TensorFacts> facts_;
  std::vector<Layer> layers_;
  std::vector<std::optional<FewLayers>> prepared_;
};

// What decoder_layer keeps under a plan number.
struct Plan {
  std::shared_ptr<const Lists> lists;
  std::shared_ptr<const PreparedLayers> prepared;
};
using Plans = std::unordered_map<int64_t, Plan>;

std::mutex plans_mutex;

// The plans by their number. The map is never destroyed, because when the process ends, the Python objects that belong
// to the tensors are already gone.
Plans& plans() {
  static Plans& held = *new Plans;
  return held;
}

// Returns the given lists, and keeps them under the number `plan` if `plan` is not 0. If no tensors are given, returns
// what is kept under `plan`.
Plan plan_of(int64_t plan, Lists given) {
  // A replaced plan is destroyed after plans_mutex is unlocked: to release a tensor may take Python's global lock,
  // which another thread holds while it waits for plans_mutex in peft_ext_forget_plan.
  Plan replaced;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  if (!given.tensors.empty()) {
    Plan found{std::make_shared<const Lists>(std::move(given)), nullptr};
    if (plan != 0) replaced = std::exchange(plans()[plan], found);
    return found;
  }
  const auto found = plans().find(plan);
  STD_TORCH_CHECK(found != plans().end(), kOp, ": no lists are given, and none are kept under plan ", plan);
  return found->second;
}

// Keeps the prepared layers under the number `plan`, unless another thread has replaced or forgotten the plan's lists.
void keep_layers(int64_t plan, const Plan& made) {
  Plan replaced;  // destroyed after plans_mutex is unlocked
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto found = plans().find(plan);
  if (found != plans().end() && found->second.lists == made.lists) replaced = std::exchange(found->second, made);
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
  const ScratchOfCall scratch_of_call;
  Plan kept = plan_of(plan, {std::move(given_tensors), std::move(given_sizes), std::move(given_numbers)});
  STD_TORCH_CHECK(x.dim() == 3 && keys.dim() == 4 && values.dim() == 4, kOp,
                  ": x is not [B, T, K], or keys or values are not [B, H, capacity, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), size = keys.size(3);
  for (const Tensor* held : {&keys, &values})
    STD_TORCH_CHECK(held->size(0) == batch && held->size(1) == keys.size(1) && held->size(3) == size && size > 0 &&
                        held->stride(3) == 1 && held->scalar_type() == x.scalar_type() && past >= 0 &&
                        past <= held->size(2) - tokens,
                    kOp, ": keys or values have no room for the tokens of x behind ", past, " tokens");
  if (kept.prepared == nullptr || !kept.prepared->fit(*kept.lists, x)) {
    kept.prepared = std::make_shared<const PreparedLayers>(kept.lists, x);
    if (plan != 0 && kept.prepared->may_be_kept()) keep_layers(plan, kept);
  }
  const PreparedLayers& layers = *kept.prepared;
  const auto& [tensors, sizes, numbers] = *kept.lists;
  const int64_t hidden = x.size(2), width = layers.outputs(1);
  STD_TORCH_CHECK(width == keys.size(1) * size && layers.outputs(2) == width && layers.outputs(0) % size == 0 &&
                      layers.outputs(3) == hidden && layers.outputs(6) == hidden,
                  kOp, ": the layers do not give the heads of the keys, or the columns of x");
  const bool rounds = sizes[1] != 0;
  const Tensor residual = as_contiguous(x);
  // If rms_norm_cpu rounds before it multiplies by a weight of another dtype than x, its result is float32, which
  // decoder_layer does not support.
  for (size_t i = 0; i < kNorms; ++i)
    STD_TORCH_CHECK(!rounds || tensors[i].scalar_type() == x.scalar_type(), kOp,
                    ": a norm's weight is not of x's type");
  const Tensor normed = std::get<0>(rms_norm_cpu(residual, tensors[0], numbers[0], numbers[2], rounds));
  const std::vector<Tensor> projected = layers.forward(PreparedLayers::kProjections, normed);
  const Tensor q = heads_of(projected[0], size);
  const Tensor rotated = like_with_whole_rows(q);
  rotate_heads(kOp, q, heads_of(projected[1], size), cos, sin, rotated, tokens_of(keys, past, tokens), false);
  copy_heads(heads_of(projected[2], size), tokens_of(values, past, tokens));
  const Tensor attended = std::get<0>(scaled_dot_product_attention_cpu(rotated, tokens_of(keys, 0, past + tokens),
                                                                       tokens_of(values, 0, past + tokens), mask, false,
                                                                       numbers[3], 0.0, std::nullopt, std::nullopt));
  const int64_t columns = layers.outputs(0);
  const Tensor rows = strided(attended, {batch, tokens, columns}, {tokens * columns, columns, 1}, 0);
  const Tensor h = sum_of(residual, layers.forward(PreparedLayers::kOutput, rows)[0]);
  const Tensor second = std::get<0>(rms_norm_cpu(h, tensors[1], numbers[1], numbers[2], rounds));
  const std::vector<Tensor> inner = layers.forward(PreparedLayers::kGateUp, second);
  const Tensor gated = gated_activation_cpu(inner[0], inner[1], sizes[0]);
  return sum_of(h, layers.forward(PreparedLayers::kDown, gated)[0]);
}

}  // namespace
}  // namespace peft_ext

void peft_ext_forget_plan(int64_t plan) {
  peft_ext::Plan forgotten;  // destroyed after plans_mutex is unlocked
  const std::lock_guard<std::mutex> lock(peft_ext::plans_mutex);
  const auto found = peft_ext::plans().find(plan);
  if (found == peft_ext::plans().end()) return;
  forgotten = std::move(found->second);
  peft_ext::plans().erase(found);
}

PEFT_EXT_OPERATORS(CPU, m) { m.impl("decoder_layer", PEFT_EXT_CPU_BOX(&peft_ext::decoder_layer_cpu)); }
