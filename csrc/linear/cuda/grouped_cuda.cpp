// Computes the forward of a mixed batch, in which each sample has an adapter or none. The number of launches does not
// depend on the number of adapters, except that one launch of prepare_groups_kernel can prepare at most 48 adapters and
// 64 runs of tokens. The steps of the forward, besides PyTorch's product x Wᵀ, are:
//
//   prepare_groups_kernel makes the RowTable and the bfloat16 terms of A and B.
//   One pass over x computes S (rank_pass, reduce).
//   One write of Y computes Y₀ = (s S) Bᵀ + b (expand_grouped), to which PyTorch's product is added.
//
// s, A and B are the scaling, lora_A and lora_B of a token's own adapter.
//
// For few tokens, launches cost more time than the arithmetic. Therefore, for few tokens, one launch computes S
// (shrink_few.cuh), and one launch computes the low-rank term and the bias, Y₀, both with plain FMAs. If
// few_tokens_accept returns true, few_tokens_forward computes Y after S, without PyTorch's product
// (few_tokens_cuda.cpp).
#include "linear/cuda/call.cuh"
#include "linear/cuda/prepare_groups.cuh"
#include "linear/cuda/shrink_few.cuh"

namespace peft_ext {
namespace {

// The arguments of one call of the forward of a mixed batch.
struct Batch {
  Tensor x;  // [T, K]
  const DeviceGroups& groups;
  int64_t tokens, length, inputs, outputs;  // length: number of tokens of a sample
  std::vector<Tensor> lora_A, lora_B;       // contiguous matrices
  int64_t rank = 0;                         // the largest rank of an adapter that a sample uses
};

// Calls f(adapter, samples) for each adapter that has samples, and at last f(-1, samples) for the samples without an
// adapter, if there are such samples. `samples` has the samples' indices.
template <typename F>
void each_group(const Batch& batch, F f) {
  const auto adapters = static_cast<int64_t>(batch.lora_A.size());
  std::vector<std::vector<int64_t>> samples(static_cast<size_t>(adapters) + 1);
  for (size_t i = 0; i < batch.groups.adapters.size(); ++i) {
    const int64_t group = batch.groups.adapters[i];
    samples[static_cast<size_t>(group < 0 ? adapters : group)].push_back(static_cast<int64_t>(i));
  }
  for (int64_t g = 0; g <= adapters; ++g)
    if (!samples[static_cast<size_t>(g)].empty()) f(g < adapters ? g : -1, samples[static_cast<size_t>(g)]);
}

// --- few tokens ------------------------------------------------------------------------------------------------------

// Computes S of a mixed batch of few tokens, and writes a TokenFactor for each token, from which the next kernel reads
// the B, the rank and the scaling of the token's adapter.
HeldFactors shrink_grouped(const Batch& batch, const Tensor& s) {
  const Tensor factors =
      device_empty(batch.x, {batch.tokens * static_cast<int64_t>(sizeof(TokenFactor))}, ScalarType::Byte);
  Launcher launcher(batch.x);
  ShrinkGrouped work{};
  work.few.x = launcher.in<void>(batch.x);
  work.few.tokens = batch.tokens;
  work.few.inputs = batch.inputs;
  work.few.rank = s.size(1);
  work.few.whole = whole_columns(batch.x, batch.inputs);
  work.few.s = launcher.scratch<float>(s);
  work.factors = static_cast<TokenFactor*>(launcher.scratch<void>(factors));
  int64_t count = 0;
  each_group(batch, [&](int64_t group, const std::vector<int64_t>& samples) {
    DeviceTokenGroup all{};
    if (group >= 0) {
      const auto g = static_cast<size_t>(group);
      const Tensor &a = batch.lora_A[g], &b = batch.lora_B[g];
      all.lora_A = launcher.in<void>(a);
      all.type_A = dtype_of(a.scalar_type());
      all.whole_A = whole_columns(a, batch.inputs);
      all.factor = {launcher.in<void>(b), dtype_of(b.scalar_type()), static_cast<int32_t>(a.size(0)),
                    static_cast<float>(batch.groups.scaling[g])};
    }
    const auto tokens = static_cast<int64_t>(samples.size()) * batch.length;
    for (int64_t first = 0; first < tokens; first += kShrinkTokens) {
      DeviceTokenGroup& part = work.groups[count++] = all;
      for (int64_t at = first; at < std::min<int64_t>(first + kShrinkTokens, tokens); ++at)
        part.tokens[part.count++] =
            static_cast<int8_t>(samples[static_cast<size_t>(at / batch.length)] * batch.length + at % batch.length);
    }
  });
  with_type(batch.x.scalar_type(), [&](auto zero) {
    launcher(shrink_grouped_kernel<decltype(zero)>, {work.few.rank, count}, kShrinkThreads, work);
  });
  return {factors, batch.lora_B};
}

// --- tiles of rows ---------------------------------------------------------------------------------------------------

struct Prepared {
  RowTiles tiles;
  HeldTerms a, b;
};

// Assigns each token of the batch to a row of the RowTable (row_tiles.cuh), sets the numbers of tiles in `tiles`, and
// returns the runs, from which prepare_groups_kernel fills the table. A run consists of tokens of adjacent samples that
// have the same adapter, or that all have none.
std::vector<TokenRun> place_tokens(const Batch& batch, RowTiles* tiles) {
  std::vector<TokenRun> runs;
  each_group(batch, [&](int64_t group, const std::vector<int64_t>& samples) {
    RowTile tile{-1, 0, 0.0f};
    if (group >= 0) {
      const auto g = static_cast<size_t>(group);
      tile = {static_cast<int32_t>(group), static_cast<int32_t>(batch.lora_A[g].size(0)),
              static_cast<float>(batch.groups.scaling[g])};
    }
    int64_t place = tiles->count * kTileRows;
    for (size_t i = 0; i < samples.size(); ++i) {
      if (i > 0 && samples[i] == samples[i - 1] + 1) {
        runs.back().count += static_cast<int32_t>(batch.length);
      } else {
        runs.push_back({static_cast<int32_t>(samples[i] * batch.length), static_cast<int32_t>(batch.length),
                        static_cast<int32_t>(place), 0, tile});
      }
      runs.back().filled = runs.back().count;
      place += batch.length;
    }
    tiles->count = ceil_div(place, kTileRows);
    runs.back().filled += static_cast<int32_t>(tiles->count * kTileRows - place);
    if (group >= 0) tiles->adapted = tiles->count;
  });
  return runs;
}

Prepared prepare(const char* op, const Batch& batch) {
  const auto adapters = static_cast<int64_t>(batch.lora_A.size());
  STD_TORCH_CHECK(batch.tokens + adapters * kTileRows < INT32_MAX - kTileRows, op, ": x has ", batch.tokens,
                  " tokens, wanted fewer than 2^31 with 64 for each adapter");
  const ScalarType type = batch.x.scalar_type();
  const auto bfloat16 = [&](const std::vector<Tensor>& matrices) {
    return type == ScalarType::BFloat16 && std::all_of(matrices.begin(), matrices.end(), [&](const Tensor& matrix) {
             return matrix.scalar_type() == type;
           });
  };
  Prepared found;
  const std::vector<TokenRun> runs = place_tokens(batch, &found.tiles);
  constexpr int64_t kTileWords = sizeof(RowTile) / 4;
  found.tiles.rows = device_empty(batch.x, {found.tiles.count * kTileRows}, ScalarType::Int);
  found.tiles.tiles = device_empty(batch.x, {found.tiles.count, kTileWords}, ScalarType::Int);
  const int64_t padded = padded_rank(batch.rank);
  found.a = grouped_A_terms(batch.x, adapters, padded, batch.inputs, bfloat16(batch.lora_A));
  found.b = grouped_B_terms(batch.x, adapters, padded, batch.outputs, bfloat16(batch.lora_B), type);

  Launcher launcher(batch.x);
  PrepareGroups work{};
  work.inputs = batch.inputs;
  work.outputs = batch.outputs;
  work.lora_A = write_terms(launcher, found.a);
  work.lora_B = write_terms(launcher, found.b);
  work.stride_A = terms_stride(found.a) * 4;
  work.stride_B = terms_stride(found.b) * 4;
  work.rows = launcher.scratch<int32_t>(found.tiles.rows);
  work.tiles = static_cast<RowTile*>(launcher.scratch<void>(found.tiles.tiles));
  const int64_t blocks =
      ceil_div(std::max(found.a.terms.outer * found.a.terms.inner, found.b.terms.outer * found.b.terms.inner) / 2,
               kSplitThreads);
  const auto placed = static_cast<int64_t>(runs.size());
  for (int64_t g = 0, r = 0; g < adapters || r < placed; g += kPreparedAdapters, r += kPreparedRuns) {
    work.adapters = static_cast<int>(std::clamp<int64_t>(adapters - g, 0, kPreparedAdapters));
    work.runs = static_cast<int>(std::clamp<int64_t>(placed - r, 0, kPreparedRuns));
    for (int64_t i = 0; i < work.adapters; ++i) {
      const Tensor &a = batch.lora_A[static_cast<size_t>(g + i)], &b = batch.lora_B[static_cast<size_t>(g + i)];
      work.factors[i] = {launcher.in<void>(a), launcher.in<void>(b), dtype_of(a.scalar_type()),
                         dtype_of(b.scalar_type()), static_cast<int32_t>(a.size(0))};
    }
    for (int64_t i = 0; i < work.runs; ++i) work.run[i] = runs[static_cast<size_t>(r + i)];
    launcher(prepare_groups_kernel, {blocks, 2 * work.adapters + (work.runs > 0 ? 1 : 0)}, kSplitThreads, work);
    work.lora_A.data += work.adapters * work.stride_A;
    work.lora_B.data += work.adapters * work.stride_B;
  }
  return found;
}

}  // namespace

DeviceForward grouped_forward(const char* op, const Tensor& x, const DeviceWeight& weight,
                              const std::optional<Tensor>& bias, const DeviceGroups& groups) {
  const DeviceSizes size = checked_sizes(op, x, weight, DeviceAdapter{});
  const ScalarType type = x.scalar_type();
  DeviceForward out;
  out.y = device_empty(x, shape_with_last(x, size.outputs), type);
  out.z = device_empty(x, {0}, type);
  Batch batch{flat_rows(x), groups, size.tokens, 0, size.inputs, size.outputs, {}, {}};
  for (const Tensor& a : groups.lora_A) {
    batch.lora_A.push_back(as_contiguous(a));
    batch.rank = std::max(batch.rank, a.size(0));
  }
  for (const Tensor& b : groups.lora_B) batch.lora_B.push_back(as_contiguous(b));
  const bool few = size.tokens <= kGroupedFewTokens, low_rank = batch.rank > 0;
  // shrink_grouped_kernel, which computes S for few tokens, writes all of S. The kernels for more tokens write only as
  // many columns of S as the largest rank of an adapter that a sample uses, so that S may have to be set to zeros
  // before.
  out.s = low_rank && (few || batch.rank == groups.rank)
              ? device_empty(x, {size.tokens, groups.rank}, ScalarType::Float)
              : device_zeros(x, {size.tokens, groups.rank}, ScalarType::Float);
  if (size.tokens == 0) return out;
  STD_TORCH_CHECK(size.inputs > 0 && size.outputs > 0, op, ": weight is [", size.outputs, ", ", size.inputs,
                  "], wanted at least one output and one input");
  check_kernel_dtype(op, "x", type);
  batch.length = size.tokens / static_cast<int64_t>(groups.adapters.size());
  const std::optional<Tensor> held_bias = checked_bias(op, bias, x, size.outputs);
  const Tensor y = as_shape(out.y, {size.tokens, size.outputs});

  std::optional<HeldFactors> factors;
  if (few && low_rank) factors = shrink_grouped(batch, out.s);
  if (few_tokens_accept(weight, type, size.tokens, DeviceAdapter{}) && few) {
    few_tokens_forward(batch.x, weight, held_bias, DeviceAdapter{}, size, false, out, y, false,
                       factors.has_value() ? &*factors : nullptr);
    return out;
  }
  const Tensor product = transposed(dense_weight(weight, type));
  if (factors.has_value()) {
    expand_few(y, out.s, *factors, held_bias);
  } else if (low_rank) {
    const Prepared prepared = prepare(op, batch);
    const HeldTerms s_terms = left_terms(x, prepared.tiles.adapted * kTileRows, padded_rank(batch.rank), type);
    PassInput input = dense_input(batch.x);
    input.tiles = &prepared.tiles;
    const PassSums sums = rank_pass(input, &prepared.a, nullptr);
    Reduced wanted;
    wanted.plain = &out.s;
    wanted.terms = &s_terms;
    wanted.tiles = &prepared.tiles;
    reduce(sums.rows, batch.rank, wanted);
    expand_grouped(y, prepared.tiles, s_terms, prepared.b, held_bias);
  } else if (held_bias.has_value()) {
    expand(y, nullptr, nullptr, nullptr, held_bias);
  } else {
    mm_out(y, batch.x, product);
    return out;
  }
  addmm_(y, batch.x, product, 1.0);
  return out;
}

}  // namespace peft_ext
