// Computes adapted layers for few tokens; see few_layers.h. All memory between the stages is one block, because in a
// call of one token the allocation of tensors would take as long as the products.
#include "linear/cpu/few_layers.h"

#include <algorithm>
#include <functional>

#include "cpu/scratch.h"
#include "cpu/stages.h"
#include "linear/cpu/tiles/products.h"
#include "packed/cpu/decode.h"

namespace peft_ext {
namespace {

// Returns memory for `count` values at *room, and moves *room behind it.
template <typename T>
T* take(char** room, int64_t count) {
  char* const found = *room;
  *room += round_up(count * static_cast<int64_t>(sizeof(T)), kFewAlignment);
  return reinterpret_cast<T*>(found);
}

// Writes `count` values of x, of dtype `dtype`, to `out` in float32.
void widen_values(const void* x, DType dtype, int64_t count, float* out) {
  with_dtype(dtype, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  });
}

// Returns `count` float32 values, in `dtype` at *room.
const void* rounded(const float* values, DType dtype, int64_t count, char** room) {
  if (dtype == DType::kF32) return values;
  void* found = nullptr;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = take<T>(room, count);
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(values[i]);
    found = to;
  });
  return found;
}

// Returns the values of a contiguous vector in float32, padded with zeros to `length` elements: the vector's own memory
// if it is long enough, otherwise a copy at *room. Returns null without a vector.
const float* padded_values(const char* op, const char* argument, const std::optional<Tensor>& vector, int64_t length,
                           char** room) {
  if (!vector.has_value()) return nullptr;
  const int64_t count = vector->numel();
  STD_TORCH_CHECK(count <= length, op, ": ", argument, " has ", count, " elements, wanted at most ", length);
  if (vector->scalar_type() == ScalarType::Float && count == length) return vector->const_data_ptr<float>();
  float* to = take<float>(room, length);
  widen_values(vector->const_data_ptr(), dtype_of(op, argument, *vector), count, to);
  std::fill(to + count, to + length, 0.0f);
  return to;
}

// Returns the arguments of PassKernels::few_tokens for a contiguous matrix w [N, K].
FewTokens few_tokens_of(const char* op, const char* argument, const Tensor& w, const float* x, int64_t tokens, float* y,
                        bool accumulate) {
  return {w.const_data_ptr(), dtype_of(op, argument, w), w.size(0), w.size(1), tokens, x, y, accumulate};
}

// Returns the base product x Wᵀ of a layer that few_tokens_accept accepts.
FewTokensProduct few_tokens_product(const char* op, const FrozenWeight& weight, ScalarType type, int64_t tokens) {
  if (weight.is_packed()) return skinny_parts(op, type, tokens, weight);
  FewTokensProduct product;
  const int64_t rows = weight.out_features(), columns = weight.in_features();
  product.units = rows;
  product.work = columns * tokens;
  product.wide = true;
  const void* w = weight.weight.const_data_ptr();
  if (!tiles_take_few_tokens(type)) {
    const FewTokens work{w, dtype_of(op, "weight", weight.weight), rows, columns, tokens, nullptr, nullptr};
    product.multiply = [work, &isa = pass_kernels()](const void* x, float* y, int64_t begin, int64_t end) {
      FewTokens part = work;
      part.x = static_cast<const float*>(x);
      part.y = y;
      isa.few_tokens(part, begin, end);
    };
    return product;
  }
  const TileKernels& isa = *tile_kernels();
  product.room = round_up(columns, kTileDepth) * tokens * static_cast<int64_t>(sizeof(bf16));
  product.order = [=, &isa](const void* x, void* room) {
    isa.few_tokens_pack(static_cast<const float*>(x), tokens, columns, static_cast<bf16*>(room));
  };
  product.multiply = [=, &isa](const void* x, float* y, int64_t begin, int64_t end) {
    isa.few_tokens({static_cast<const bf16*>(w), rows, columns, tokens, static_cast<const bf16*>(x), y}, begin, end);
  };
  return product;
}

}  // namespace

bool few_tokens_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Adapter& adapter) {
  if ((adapter.drop_base && adapter.dropout.active) || weight.in_features() == 0) return false;
  if (weight.is_packed()) return skinny_accepts(weight, type, tokens);
  if (!weight.weight.is_contiguous()) return false;
  return tiles_take_few_tokens(type) ? !tiles_accept(weight, type, tokens, TileProduct::kForward)
                                     : tokens <= kFewTokens;
}

void FewLayers::Run::shrink_rows(const PassKernels& isa, int64_t begin, int64_t end) const {
  isa.few_tokens(shrink, begin, end);
  const int64_t rank = shrink.rows;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = begin; r < end; ++r)
      left[t * rank + r] = s[t * rank + r] * (rank_scale ? scaling * rank_scale[r] : scaling);
}

void FewLayers::Run::finish_rows(const PassKernels& isa, int64_t begin, int64_t end) const {
  if (expand.rows > 0) isa.few_tokens(expand, begin, end);
  isa.expand(finish, 0, tokens, begin, end);
}

FewLayers::FewLayers(const char* op, ScalarType type, int64_t tokens, int64_t columns)
    : op_(op), type_(type), dtype_(dtype_of(op, "x", type)), tokens_(tokens), columns_(columns) {
  reserve(tokens * columns * static_cast<int64_t>(sizeof(float)));
}

std::optional<FewLayers> FewLayers::of(const char* op, const Layer* begin, const Layer* end, ScalarType type,
                                       int64_t tokens, int64_t columns) {
  if (tokens == 0) return std::nullopt;
  FewLayers found(op, type, tokens, columns);
  for (const Layer* layer = begin; layer != end; ++layer) {
    check_matrix_weight(op, layer->weight, type);
    const LinearSizes size = checked_sizes(op, tokens, columns, layer->weight, layer->adapter);
    check_bias(op, layer->bias, size);
    if (size.out == 0 || !few_tokens_accept(layer->weight, type, tokens, layer->adapter)) return std::nullopt;
    found.add(layer->weight, layer->adapter, size, layer->bias, false, layer->adapter.out_scale);
  }
  return found;
}

void FewLayers::reserve(int64_t bytes) { bytes_ += round_up(bytes, kFewAlignment); }

void FewLayers::add(const FrozenWeight& weight, const Adapter& adapter, const LinearSizes& size,
                    const std::optional<Tensor>& bias, bool bias_inside, const std::optional<Tensor>& scale) {
  const auto held = [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
  };
  const std::optional<Tensor>& rank_scale = adapter.rank_scale;
  STD_TORCH_CHECK(!rank_scale.has_value() || rank_scale->numel() == size.rank, op_, ": rank_scale has ",
                  rank_scale.has_value() ? rank_scale->numel() : 0, " elements, wanted ", size.rank);
  members_.push_back({&adapter, size, few_tokens_product(op_, weight, type_, tokens_), held(adapter.lora_A),
                      held(adapter.lora_B), held(rank_scale), held(bias), held(scale), bias_inside});
  const Member& member = members_.back();
  widens_ = widens_ || member.base.wide || adapter.in_scale.has_value() || adapter.low_rank();
  constexpr int64_t kFloat = sizeof(float);
  const int64_t of_x = tokens_ * columns_ * kFloat, of_rank = size.rank * kFloat;
  const int64_t of_vector = round_up(size.out, kColumnStep) * kFloat;
  if (adapter.dropout.active) reserve(of_x);
  if (adapter.in_scale.has_value()) {
    reserve(of_x);
    reserve(of_x);
  }
  reserve(member.base.room);
  reserve(tokens_ * size.out * kFloat);
  reserve(tokens_ * of_rank);
  reserve(tokens_ * of_rank);
  reserve(of_rank);
  reserve(of_vector);
  reserve(of_vector);
}

// Sets `run` for a call with x, and copies x into the order in which the base product reads it. wide: x in float32, or
// null if no layer reads it.
void FewLayers::prepare(const Member& member, const void* x, const float* wide, const Results& results, char** room,
                        Run* run) const {
  const Adapter& adapter = *member.adapter;
  const LinearSizes& size = member.size;
  run->base = &member.base;
  run->tokens = tokens_;
  run->before = take<float>(room, tokens_ * size.out);
  run->s = take<float>(room, tokens_ * size.rank);
  run->left = take<float>(room, tokens_ * size.rank);
  run->scaling = static_cast<float>(adapter.scaling);
  run->rank_scale = padded_values(op_, "rank_scale", member.rank_scale, size.rank, room);
  if (results.s != nullptr) run->s = results.s;
  if (member.lora_A.has_value()) {
    const float* dropped = wide;
    if (adapter.dropout.active) {
      float* to = take<float>(room, tokens_ * columns_);
      drop_elements({wide, DType::kF32, adapter.dropout, to}, tokens_ * columns_);
      dropped = to;
    }
    run->shrink = few_tokens_of(op_, "lora_A", *member.lora_A, dropped, tokens_, run->s, false);
    run->expand = few_tokens_of(op_, "lora_B", *member.lora_B, run->left, tokens_, run->before, true);
  }
  if (adapter.in_scale.has_value()) {
    const float* l = adapter.in_scale->const_data_ptr<float>();
    float* scaled = take<float>(room, tokens_ * columns_);
    for (int64_t t = 0; t < tokens_; ++t)
      for (int64_t k = 0; k < columns_; ++k) scaled[t * columns_ + k] = wide[t * columns_ + k] * l[k];
    wide = scaled;
    x = rounded(scaled, dtype_, tokens_ * columns_, room);
  }
  run->x = member.base.wide ? static_cast<const void*>(wide) : x;
  if (member.base.order) {
    void* ordered = take<char>(room, member.base.room);
    member.base.order(run->x, ordered);
    run->x = ordered;
  }
  Expand& finish = run->finish;
  finish.y = results.y;
  finish.z = results.z;
  finish.dtype = dtype_;
  finish.columns = size.out;
  finish.rank = 0;
  finish.stride = round_up(size.out, kColumnStep);
  finish.scale = padded_values(op_, "out_scale", member.scale, finish.stride, room);
  const float* bias = padded_values(op_, "bias", member.bias, finish.stride, room);
  (member.bias_inside ? finish.bias_before : finish.bias) = bias;
  finish.before = run->before;
}

void FewLayers::add_to(Stages* stages, const void* x, const std::vector<Results>& results, char* room,
                       std::vector<Run>* runs) const {
  const PassKernels& isa = pass_kernels();
  const bool copies = widens_ && dtype_ != DType::kF32;
  const auto* wide = copies ? reinterpret_cast<const float*>(room) : static_cast<const float*>(x);
  runs->resize(members_.size());
  stages->add(1).add(1, 1, [=](int64_t, int64_t) {
    char* next = room;
    if (copies) widen_values(x, dtype_, tokens_ * columns_, take<float>(&next, tokens_ * columns_));
    for (size_t i = 0; i < members_.size(); ++i) prepare(members_[i], x, wide, results[i], &next, &(*runs)[i]);
  });
  Loops &shrink = stages->add(kPackGrain), &rows = stages->add(kDecodeGrain);
  bool later = false;  // whether a layer's final pass comes after the loop over the rows of W
  for (size_t i = 0; i < members_.size(); ++i) {
    const Run& run = (*runs)[i];
    const Member& member = members_[i];
    const FewTokensProduct& base = member.base;
    if (member.lora_A.has_value())
      shrink.add(member.size.rank, columns_ * tokens_,
                 [&isa, &run](int64_t begin, int64_t end) { run.shrink_rows(isa, begin, end); });
    if (member.finishes_rows())
      rows.add(base.units, base.work, [&isa, &run](int64_t begin, int64_t end) {
        run.multiply(begin, end);
        run.finish_rows(isa, begin, end);
      });
    else
      rows.add(base.units, base.work, [&run](int64_t begin, int64_t end) { run.multiply(begin, end); });
    later = later || !member.finishes_rows();
  }
  if (!later) return;
  for (size_t i = 0; i < members_.size(); ++i)
    if (const Groups* groups = members_[i].adapter->groups; groups != nullptr) {
      const Run& run = (*runs)[i];
      const int64_t out = members_[i].size.out;
      stages->add_call([=, &run] { grouped_few_tokens(op_, *groups, wide, columns_, run.before, out, run.s); });
    }
  Loops& last = stages->add(kPackGrain);
  for (size_t i = 0; i < members_.size(); ++i) {
    const Run& run = (*runs)[i];
    const LinearSizes& size = members_[i].size;
    if (!members_[i].finishes_rows())
      last.add(size.out, tokens_ * (size.rank + 1),
               [&isa, &run](int64_t begin, int64_t end) { run.finish_rows(isa, begin, end); });
  }
}

void FewLayers::run(const void* x, const std::vector<Results>& results) const {
  Stages stages;
  std::vector<Run> runs;
  add_to(&stages, x, results, static_cast<char*>(scratch(Scratch::kTokens, static_cast<size_t>(bytes_))), &runs);
  stages.run();
}

}  // namespace peft_ext
