// A decoder layer of a transformer for few tokens on the CPU, without a gradient:
//
//   q, k, v = projections(norm₁(x));   the rotated k, and v, are written to the cache, after its keys and values;
//   h = x + post₁(o(attention(rotated q, all keys, all values)));
//   y = h + post₂(down(act(gate(norm₂(h))) ∘ up(norm₂(h))))
//
// norm₁ and norm₂ are norms, or leave their input as it is; so are post₁ and post₂. In some layers, q and k are normed
// before they are rotated: each head by itself, or all heads of a token together.
//
// Most steps run the kernels of an operator (rms_norm, lora_linears, rotary_embedding, scaled_dot_product_attention,
// gated_activation), and give the same bits as a call of that operator. The copy of v to the cache and the two
// additions are computed in this file. One call from Python runs all steps of the layer, as the stages of one parallel
// loop. Their intermediate values are in one block of the calling thread's scratch, because the allocation of a tensor
// for each, and a loop for each step, would take as long as the kernels.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "activations/glue.h"
#include "activations/kernels.h"
#include "attention/operators.h"
#include "common/api.h"
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "cpu/parts.h"
#include "cpu/stages.h"
#include "linear/cpu/few_layers.h"
#include "linear/cpu/packing.h"
#include "norm/kernels.h"
#include "rotary/kernels.h"
#include "siblings/layers.h"

namespace peft_ext {
namespace {

constexpr const char* kOp = "decoder_layer";
constexpr size_t kLayers = 7;  // number of linear layers: q, k, v, o, gate, up, down
constexpr size_t kLayerSizes = 4, kLayerNumbers = 2;
// Number of entries at the start of the list `sizes`: the activation, whether the norms round before they multiply by
// the weight, and which pairs of norms the layer has.
constexpr size_t kOwnSizes = 3;
// The list `numbers` starts with eps of each norm; this number of entries follows: the offset of the norms' weights,
// and the scale of attention.
constexpr size_t kOwnNumbers = 2;
// The norms in their order in the lists, which have the norms of the layer alone. A layer has both norms of a pair or
// none: the norms before attention and before the MLP (bit 0 of sizes[2]), those behind them (bit 1), and those of q
// and of k (bit 2).
enum Norm : size_t { kFirstNorm, kSecondNorm, kFirstPost, kSecondPost, kNormOfQ, kNormOfK, kMostNorms };
constexpr int64_t kMostPairs = int64_t{1} << kMostNorms / 2;  // sizes[2] is less than this number

// The list arguments of decoder_layer for one decoder layer. To convert these lists from Python takes as long as to
// compute a small decoder layer.
struct Lists {
  std::vector<Tensor> tensors;
  std::vector<int64_t> sizes;
  std::vector<double> numbers;
};

// What the kernels know of tensors before they read the tensors' values.
class TensorFacts {
 public:
  explicit TensorFacts(const std::vector<Tensor>& tensors) {
    for (const Tensor& of : tensors) {
      const auto sizes = of.sizes();
      facts_.push_back({of.const_data_ptr(), of.scalar_type(), of.is_contiguous(), sizes.size()});
      sizes_.insert(sizes_.end(), sizes.begin(), sizes.end());
      are_contiguous_ = are_contiguous_ && of.is_contiguous();
    }
  }

  bool are_contiguous() const { return are_contiguous_; }

  // Returns whether the tensors, as many as before, still have the same memory, dtypes, contiguity and sizes.
  bool hold(const std::vector<Tensor>& tensors) const {
    read_ahead(tensors);
    const int64_t* sizes = sizes_.data();
    for (size_t i = 0; i < facts_.size(); ++i) {
      const Tensor& of = tensors[i];
      const Fact& fact = facts_[i];
      const auto now = of.sizes();
      if (of.const_data_ptr() != fact.data || of.scalar_type() != fact.type || of.is_contiguous() != fact.contiguous ||
          now.size() != fact.dims || !std::equal(now.begin(), now.end(), sizes))
        return false;
      sizes += fact.dims;
    }
    return true;
  }

 private:
  struct Fact {
    const void* data;
    ScalarType type;
    bool contiguous;
    size_t dims;
  };

  // Prefetches the objects of torch in which `hold` follows pointers: in generation, reading the model's weights has
  // displaced them from the cache, and one after the other they would take longer than a small layer's product. Where
  // torch keeps the pointers is known from at::Tensor, c10::TensorImpl and c10::StorageImpl of torch 2.11 to 2.13; in
  // another torch, other lines are prefetched, which changes only the time.
  static void read_ahead(const std::vector<Tensor>& tensors) {
    constexpr size_t kLine = 64, kStorageAt = 16, kLinesOfTensor = 3;
    const auto pointer_at = [](const void* object, size_t at) {
      const char* found = nullptr;
      memcpy(&found, static_cast<const char*>(object) + at, sizeof(found));
      return found;
    };
    for (const Tensor& tensor : tensors) __builtin_prefetch(tensor.get());
    for (const Tensor& tensor : tensors) {
      const char* held = pointer_at(tensor.get(), 0);
      for (size_t line = 0; line < kLinesOfTensor; ++line) __builtin_prefetch(held + line * kLine);
    }
    for (const Tensor& tensor : tensors) __builtin_prefetch(pointer_at(pointer_at(tensor.get(), 0), kStorageAt));
  }

  std::vector<Fact> facts_;
  std::vector<int64_t> sizes_;  // of all tensors, one after the other
  bool are_contiguous_ = true;
};

// A norm of a decoder layer: its contiguous weight, the number of rows that it norms in each token (more than one for a
// norm that norms each head of q by itself), and its eps.
struct NormOfLayer {
  Tensor weight;
  int64_t rows;
  double eps;
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
        facts_(lists_->tensors),
        isa_(current_isa()),
        type_(x.scalar_type()),
        tokens_(rows_of(x)),
        columns_(x.size(2)) {
    const auto& [tensors, sizes, numbers] = *lists_;
    STD_TORCH_CHECK(sizes.size() == kOwnSizes + kLayers * kLayerSizes, kOp, ": sizes are not those of ", kLayers,
                    " layers");
    const int64_t pairs = sizes[2];
    STD_TORCH_CHECK(pairs >= 0 && pairs < kMostPairs, kOp, ": the pairs of norms are ", pairs,
                    ", wanted a number from 0 to ", kMostPairs - 1);
    const auto has_norm = [pairs](size_t i) { return (pairs >> (i / 2) & 1) != 0; };
    size_t norms = 0;
    for (size_t i = 0; i < kMostNorms; ++i) norms += has_norm(i);
    STD_TORCH_CHECK(tensors.size() >= norms && numbers.size() == norms + kOwnNumbers + kLayers * kLayerNumbers, kOp,
                    ": tensors or numbers are not those of ", norms, " norms and ", kLayers, " layers");
    layers_ = lora_layers(kOp, {tensors.begin() + norms, tensors.end()}, {sizes.begin() + kOwnSizes, sizes.end()},
                          {numbers.begin() + norms + kOwnNumbers, numbers.end()});
    checked_gate(kOp, sizes[0]);
    offset_ = numbers[norms];
    scale_ = numbers[norms + 1];
    size_t given = 0;
    for (size_t i = 0; i < kMostNorms; ++i) {
      if (!has_norm(i)) continue;
      const Tensor& weight = tensors[given];
      dtype_of(kOp, "norm weight", weight);
      const bool of_heads = i >= kNormOfQ;  // whether this is the norm of q or of k
      const int64_t normed = of_heads ? outputs(i - kNormOfQ) : columns_, count = weight.numel();
      STD_TORCH_CHECK(count == normed || (of_heads && count > 0 && normed % count == 0), kOp, ": a norm's weight has ",
                      count, " elements, wanted ", of_heads ? "a divisor of " : "", normed);
      // If a norm rounds before it multiplies by a weight of another dtype than x, its result is float32, which
      // decoder_layer does not support.
      STD_TORCH_CHECK(sizes[1] == 0 || weight.scalar_type() == type_, kOp, ": a norm's weight is not of x's type");
      norms_[i] = NormOfLayer{as_contiguous(weight), count == 0 ? 0 : normed / count, numbers[given]};
      ++given;
    }
    STD_TORCH_CHECK(scale_ > 0.0 && std::isfinite(scale_), kOp, ": scale is ", scale_,
                    ", wanted a finite number above 0");
    const int64_t columns[kGroups] = {columns_, outputs(0), columns_, outputs(4)};
    for (size_t group = 0; group < kGroups; ++group)
      prepared_.push_back(FewLayers::of(kOp, layers_.data() + kFirst[group], layers_.data() + kFirst[group + 1], type_,
                                        tokens_, columns[group]));
  }
  PreparedLayers(const PreparedLayers&) = delete;  // prepared_ refers to layers_
  PreparedLayers& operator=(const PreparedLayers&) = delete;

  // Returns whether a later call with the same lists may use these layers: no value was read and nothing was copied.
  bool may_be_kept() const {
    if (!facts_.are_contiguous()) return false;
    for (const Layer& layer : layers_)
      if (layer.adapter.dropout.active) return false;
    return true;
  }

  // Returns whether these layers are those of the lists for x.
  bool fit(const Lists& lists, const Tensor& x) const {
    return &lists == lists_.get() && current_isa() == isa_ && x.scalar_type() == type_ && rows_of(x) == tokens_ &&
           x.size(2) == columns_ && facts_.hold(lists.tensors);
  }

  int64_t outputs(size_t layer) const { return layers_[layer].weight.out_features(); }

  // Returns norm i; nullopt if the layer does not have this norm.
  const std::optional<NormOfLayer>& norm(size_t i) const { return norms_[i]; }
  double offset() const { return offset_; }  // what is added to the weights of the norms
  double scale() const { return scale_; }    // the scale of attention

  // Returns the number of bytes of the room that a call of `add` needs.
  int64_t bytes() const {
    int64_t most = 0;
    for (const std::optional<FewLayers>& few : prepared_)
      if (few.has_value()) most = std::max(most, few->bytes());
    return most;
  }

  // Adds to `stages` the stages that compute a group for x [tokens, columns], and write Y of each layer to its memory
  // in `ys`. `room` and `runs` must live until the stages have run; several groups may have the same room.
  void add(Stages* stages, Group group, const void* x, const std::vector<void*>& ys, char* room,
           std::vector<FewLayers::Run>* runs) const {
    if (const std::optional<FewLayers>& few = prepared_[group]; few.has_value()) {
      std::vector<FewLayers::Results> results;
      for (void* y : ys) results.push_back({y, nullptr, nullptr});
      return few->add_to(stages, x, results, room, runs);
    }
    stages->add_call([=] {
      const std::vector<Layer> layers(layers_.data() + kFirst[group], layers_.data() + kFirst[group + 1]);
      const int64_t columns = layers[0].weight.in_features();
      const Tensor rows = torch::stable::from_blob(const_cast<void*>(x), {tokens_, columns}, {columns, 1},
                                                   torch::stable::Device(torch::headeronly::DeviceType::CPU), type_);
      const std::vector<AdaptedForward> found = adapted_forwards(kOp, rows, layers);
      for (size_t i = 0; i < ys.size(); ++i)
        memcpy(ys[i], found[i].y.const_data_ptr(), static_cast<size_t>(found[i].y.numel()) * found[i].y.element_size());
    });
  }

 private:
  static constexpr size_t kFirst[kGroups + 1] = {0, 3, 4, 6, kLayers};

  std::shared_ptr<const Lists> lists_;
  TensorFacts facts_;
  Isa isa_;
  ScalarType type_;
  int64_t tokens_, columns_;
  std::optional<NormOfLayer> norms_[kMostNorms];
  double offset_ = 0.0, scale_ = 0.0;
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

// The intermediate values of a call, in x's dtype but for the factors, rstd and lse, which are float32.
struct Values {
  void *normed, *q, *k, *v, *rotated, *attended, *projected, *h, *second, *gate, *up, *gated, *down;
  float *factors[kMostNorms], *rstd[kMostNorms], *lse;
  char* room;

  Values(Parts* parts, const PreparedLayers& layers, int64_t tokens, int64_t columns, int64_t rows, int64_t element) {
    const auto matrix = [&](int64_t of_token) { return parts->take<char>(tokens * of_token * element); };
    normed = matrix(columns);
    q = matrix(layers.outputs(0));
    k = matrix(layers.outputs(1));
    v = matrix(layers.outputs(2));
    rotated = matrix(layers.outputs(0));
    attended = matrix(layers.outputs(0));
    projected = matrix(columns);
    h = matrix(columns);
    second = matrix(columns);
    gate = matrix(layers.outputs(4));
    up = matrix(layers.outputs(5));
    gated = matrix(layers.outputs(4));
    down = matrix(columns);
    for (size_t i = 0; i < kMostNorms; ++i) {
      if (!layers.norm(i).has_value()) continue;
      factors[i] = parts->take<float>(layers.norm(i)->weight.numel());
      rstd[i] = parts->take<float>(tokens * layers.norm(i)->rows);
    }
    lse = parts->take<float>(rows);
    room = parts->take<char>(layers.bytes());
  }
};

// Adds a stage that calls f(begin, end) for parts of `rows` rows of `columns` elements each.
template <typename F>
void add_rows(Stages* stages, int64_t rows, int64_t columns, const F& f) {
  stages->add(kPackGrain).add(rows, columns, f);
}

// Writes a + b, rounded once, for the elements [begin, end).
void add_elements(DType dtype, const void* a, const void* b, void* sum, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *one = static_cast<const T*>(a), *other = static_cast<const T*>(b);
    T* to = static_cast<T*>(sum);
    for (int64_t i = begin; i < end; ++i) to[i] = from_float<T>(to_float(one[i]) + to_float(other[i]));
  });
}

// Writes weight + offset in float32.
void write_factor(const Tensor& weight, double offset, float* factor) {
  with_dtype(dtype_of(kOp, "norm weight", weight), [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(weight.const_data_ptr());
    const auto more = static_cast<float>(offset);
    const int64_t count = weight.numel();
    for (int64_t k = 0; k < count; ++k) factor[k] = to_float(from[k]) + more;
  });
}

Tensor decoder_layer_cpu(Tensor x, Tensor cos, Tensor sin, std::optional<Tensor> mask, Tensor keys, Tensor values,
                         int64_t past, std::vector<Tensor> given_tensors, std::vector<int64_t> given_sizes,
                         std::vector<double> given_numbers, int64_t plan) {
  const ScratchOfCall scratch_of_call;
  Plan kept = plan_of(plan, {std::move(given_tensors), std::move(given_sizes), std::move(given_numbers)});
  STD_TORCH_CHECK(x.dim() == 3 && keys.dim() == 4 && values.dim() == 4, kOp,
                  ": x is not [B, T, K], or keys or values are not [B, H, capacity, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), size = keys.size(3);
  STD_TORCH_CHECK(tokens <= kFewQueries, kOp, ": x has ", tokens, " tokens, wanted at most ", kFewQueries);
  for (const Tensor* held : {&keys, &values})
    STD_TORCH_CHECK(held->size(0) == batch && held->size(1) == keys.size(1) && held->size(3) == size && size > 0 &&
                        size % 2 == 0 && held->stride(3) == 1 && held->scalar_type() == x.scalar_type() && past >= 0 &&
                        past <= held->size(2) - tokens,
                    kOp, ": keys or values have no room for the tokens of x behind ", past, " tokens");
  for (const Tensor* of : {&cos, &sin})
    STD_TORCH_CHECK(of->dim() == 3 && (of->size(0) == 1 || of->size(0) == batch) && of->size(0) == cos.size(0) &&
                        of->size(1) == tokens && of->size(2) == size && of->scalar_type() == x.scalar_type(),
                    kOp, ": cos and sin are not [B, T, D] or [1, T, D] of x's type");
  if (kept.prepared == nullptr || !kept.prepared->fit(*kept.lists, x)) {
    kept.prepared = std::make_shared<const PreparedLayers>(kept.lists, x);
    if (plan != 0 && kept.prepared->may_be_kept()) keep_layers(plan, kept);
  }
  const PreparedLayers& layers = *kept.prepared;
  const std::vector<int64_t>& sizes = kept.lists->sizes;
  const int64_t hidden = x.size(2), width = layers.outputs(1), of_q = layers.outputs(0), inner = layers.outputs(4);
  STD_TORCH_CHECK(width == keys.size(1) * size && layers.outputs(2) == width && width > 0 && of_q % width == 0 &&
                      layers.outputs(3) == hidden && layers.outputs(5) == inner && layers.outputs(6) == hidden,
                  kOp, ": the layers do not give the heads of the keys, or the columns of x");
  const Tensor residual = as_contiguous(x), held_cos = as_contiguous(cos), held_sin = as_contiguous(sin);
  const Tensor y = empty({batch, tokens, hidden}, x.scalar_type());
  const int64_t rows = batch * tokens;
  if (rows == 0) return y;
  const DType dtype = dtype_of(kOp, "x", x);
  const int64_t element = static_cast<int64_t>(x.element_size()), heads = of_q / size;
  Parts count{0};
  Values(&count, layers, rows, hidden, rows * heads, element);
  Parts parts{reinterpret_cast<uintptr_t>(scratch(Scratch::kLayer, count.at))};
  const Values held(&parts, layers, rows, hidden, rows * heads, element);

  const void* const inputs_of_norms[kMostNorms] = {
      residual.const_data_ptr(), held.h, held.projected, held.down, held.q, held.k};
  void* const results_of_norms[kMostNorms] = {held.normed, held.second, held.projected, held.down, held.q, held.k};
  NormRows works[kMostNorms];
  for (size_t i = 0; i < kMostNorms; ++i) {
    const std::optional<NormOfLayer>& norm = layers.norm(i);
    if (!norm.has_value()) continue;
    NormRows& work = works[i];
    work.dtype = work.out_dtype = dtype;
    work.columns = norm->weight.numel();
    work.centered = false;
    work.round_first = sizes[1] != 0;
    work.eps = static_cast<float>(norm->eps);
    work.x = inputs_of_norms[i];
    work.factor = held.factors[i];
    work.y = results_of_norms[i];
    work.rstd = held.rstd[i];
  }
  const NormKernels& norm_kernel = norm_kernels();
  // Norms the tokens [begin, end) by norm i, if the layer has this norm.
  const auto norm_tokens = [&](size_t i, int64_t begin, int64_t end) {
    if (const std::optional<NormOfLayer>& norm = layers.norm(i); norm.has_value())
      norm_kernel.rows(works[i], begin * norm->rows, end * norm->rows);
  };
  // norm₁ or norm₂ of its input, or its input if the layer has no such norm.
  const auto normed = [&](Norm i) { return layers.norm(i).has_value() ? results_of_norms[i] : inputs_of_norms[i]; };

  const auto strides = [&](const Tensor& of) {
    return HeadsOf{of.mutable_data_ptr(), of.stride(0), of.stride(1), of.stride(2)};
  };
  const HeadsOf cache_k = strides(keys), cache_v = strides(values);
  const int64_t filled = past * cache_k.token * element, filled_v = past * cache_v.token * element;
  Rotary rotary;
  rotary.dtype = dtype;
  rotary.back = false;
  rotary.tokens = tokens;
  rotary.size = size;
  rotary.parts[0] = {held.q, held.rotated, heads, tokens * of_q, size, of_q, tokens * of_q, size, of_q};
  rotary.parts[1] = {held.k,        static_cast<char*>(cache_k.data) + filled,
                     keys.size(1),  tokens * width,
                     size,          width,
                     cache_k.batch, cache_k.head,
                     cache_k.token};
  rotary.cos = held_cos.const_data_ptr();
  rotary.sin = held_sin.const_data_ptr();
  rotary.cos_batch = cos.size(0) == 1 ? 0 : tokens * size;
  const RotaryKernels& rotaries = rotary_kernels();
  // Copies v of the tokens [begin, end) of all batches to the cache.
  const auto append_v = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t head = 0; head < keys.size(1); ++head)
        memcpy(static_cast<char*>(cache_v.data) + filled_v +
                   (row / tokens * cache_v.batch + row % tokens * cache_v.token + head * cache_v.head) * element,
               static_cast<const char*>(held.v) + (row * width + head * size) * element,
               static_cast<size_t>(size * element));
  };

  Attention attention = {};
  attention.dtype = dtype;
  attention.batches = batch;
  attention.heads = heads;
  attention.kv_heads = keys.size(1);
  attention.queries = tokens;
  attention.keys = past + tokens;
  attention.size = attention.value_size = size;
  attention.scale = static_cast<float>(layers.scale());
  attention.q = {held.rotated, tokens * of_q, size, of_q};
  attention.k = cache_k;
  attention.v = cache_v;
  attention.out = {held.attended, tokens * of_q, size, of_q};
  attention.lse = held.lse;
  if (mask.has_value() && mask->numel() > 0) set_seen(kOp, *mask, &attention);
  const AttentionKernels& attentions = attention_kernels(dtype);
  const size_t of_few = attentions.few_scratch(attention);
  const int64_t units = batch * attention.kv_heads * ceil_div(heads / attention.kv_heads * tokens, kFewRows);

  GatedRows gated;
  gated.activation = checked_gate(kOp, sizes[0]);
  gated.dtype = dtype;
  gated.columns = inner;
  gated.gate = {held.gate, inner};
  gated.up = {held.up, inner};
  gated.out = {held.gated, inner};
  const ActivationKernels& activations = activation_kernels();

  Stages stages;
  std::vector<FewLayers::Run> runs[PreparedLayers::kGroups];
  const auto add_layers = [&](PreparedLayers::Group group, const void* from, const std::vector<void*>& to) {
    layers.add(&stages, group, from, to, held.room, &runs[group]);
  };
  stages.add(1).add(1, 1, [&](int64_t, int64_t) {
    for (size_t i = 0; i < kMostNorms; ++i)
      if (const std::optional<NormOfLayer>& norm = layers.norm(i); norm.has_value())
        write_factor(norm->weight, layers.offset(), held.factors[i]);
  });
  if (layers.norm(kFirstNorm).has_value())
    add_rows(&stages, rows, hidden, [&](int64_t begin, int64_t end) { norm_tokens(kFirstNorm, begin, end); });
  add_layers(PreparedLayers::kProjections, normed(kFirstNorm), {held.q, held.k, held.v});
  add_rows(&stages, rows, of_q + width, [&](int64_t begin, int64_t end) {
    for (const Norm i : {kNormOfQ, kNormOfK}) norm_tokens(i, begin, end);
    rotaries.rotate(rotary, begin, end);
    append_v(begin, end);
  });
  stages.add(1).add(units, 1, [&](int64_t begin, int64_t end) {
    attentions.few(attention, begin, end, scratch(Scratch::kPanel, of_few));
    release_large_scratch(Scratch::kPanel);
  });
  add_layers(PreparedLayers::kOutput, held.attended, {held.projected});
  add_rows(&stages, rows, hidden, [&](int64_t begin, int64_t end) {
    norm_tokens(kFirstPost, begin, end);
    add_elements(dtype, residual.const_data_ptr(), held.projected, held.h, begin * hidden, end * hidden);
    norm_tokens(kSecondNorm, begin, end);
  });
  add_layers(PreparedLayers::kGateUp, normed(kSecondNorm), {held.gate, held.up});
  add_rows(&stages, rows, inner, [&](int64_t begin, int64_t end) { activations.rows(gated, begin, end); });
  add_layers(PreparedLayers::kDown, held.gated, {held.down});
  add_rows(&stages, rows, hidden, [&](int64_t begin, int64_t end) {
    norm_tokens(kSecondPost, begin, end);
    add_elements(dtype, held.h, held.down, y.mutable_data_ptr(), begin * hidden, end * hidden);
  });
  stages.run();
  return y;
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
