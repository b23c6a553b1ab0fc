// See adapted_linear.h for the formula. Which product runs:
//
//   tiles    bfloat16 on a CPU with a bfloat16 dot product: one pass writes Y (or dX) with all its terms
//   few      few tokens: W, decoded from NF4 on the way, A and B are each read once, as they lie, in float32
//   mm       all else is PyTorch's product: in place onto the low-rank term where nothing else is to be done, else in
//            float32 (W widened a panel at a time), finished in one more pass
//
// Sums over tokens are made per chunk of tokens, whose number depends on T alone, and then added in order: the same
// bits for any number of threads.
#include "linear/adapted_linear.h"

#include <string.h>

#include <algorithm>

#include "common/isa.h"
#include "linear/scratch.h"
#include "linear/tiles.h"
#include "lora/lora_kernels.h"

namespace peft_ext {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTokenGrain = 16;
constexpr int64_t kPackGrain = 1 << 14;
constexpr int64_t kMinChunkTokens = 128;
constexpr int64_t kMaxChunks = 8;
// Rows of W widened to float32 together.
constexpr int64_t kWidePanel = 1024;
// Rows of W decoded together for a pass over W.
constexpr int64_t kRowChunk = 64;
// From this many tokens on the tiles are faster than PyTorch's own product of few rows, over a dense weight.
constexpr int64_t kDenseTileTokens = 17;

const LoraKernels& kernels() {
#if defined(__x86_64__)
  return select_kernels(&kLoraKernelsScalar, &kLoraKernelsAvx2, &kLoraKernelsAvx512);
#else
  return kLoraKernelsScalar;
#endif
}

const TileKernels* tile_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAmx:
      return &kTileKernelsAmx;
    case Isa::kAmxEmulated:
      return &kTileKernelsAmxEmulated;
    case Isa::kAvx512Bf16:
      return &kTileKernelsAvx512Bf16;
    default:
      return nullptr;
  }
#else
  return nullptr;
#endif
}

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

Tensor none(ScalarType type = ScalarType::Float) { return empty({0}, type); }

Tensor zeros(const std::vector<int64_t>& shape) {
  Tensor tensor = empty(shape, ScalarType::Float);
  memset(tensor.mutable_data_ptr(), 0, static_cast<size_t>(tensor.numel()) * sizeof(float));
  return tensor;
}

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// --- small matrices, packed ------------------------------------------------------------------------------------------

// A matrix [rows, columns] of any type as float32 in a zero-padded frame [frame_rows, frame_columns], transposed on the
// way where asked; each element times by_row[row] and by_column[column], where given.
Tensor packed(const char* op, const char* argument, const Tensor& matrix, const float* by_row, const float* by_column,
              bool transpose, int64_t frame_rows, int64_t frame_columns) {
  const Tensor source = torch::stable::contiguous(matrix);
  const int64_t rows = source.size(0), columns = source.size(1);
  Tensor frame = zeros({frame_rows, frame_columns});
  if (source.numel() == 0) return frame;
  float* out = frame.mutable_data_ptr<float>();
  const auto scale = [&](int64_t i, int64_t j) {
    return (by_row != nullptr ? by_row[i] : 1.0f) * (by_column != nullptr ? by_column[j] : 1.0f);
  };
  with_dtype(dtype_of(op, argument, source), [&](auto zero) {
    const auto* in = static_cast<const decltype(zero)*>(source.const_data_ptr());
    // Rows of the frame, each written in one piece.
    parallel_for(0, transpose ? columns : rows, ceil_div(kPackGrain, transpose ? rows : columns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     float* row = out + i * frame_columns;
                     if (transpose)
                       for (int64_t j = 0; j < rows; ++j) row[j] = scale(j, i) * to_float(in[j * columns + i]);
                     else
                       for (int64_t j = 0; j < columns; ++j) row[j] = scale(i, j) * to_float(in[i * columns + j]);
                   }
                 });
  });
  return frame;
}

// sums [columns, padded rank] float32 -> like [R, columns] (transposed) or [columns, R] in like's type; each element
// times by_column[column] and by_rank[rank], where given.
Tensor unpacked(const char* op, const char* argument, const Tensor& sums, const float* by_column, const float* by_rank,
                bool transpose, const Tensor& like) {
  const int64_t rows = like.size(0), columns = like.size(1), padded = sums.size(1);
  Tensor out = empty({rows, columns}, like.scalar_type());
  const float* in = sums.const_data_ptr<float>();
  with_dtype(dtype_of(op, argument, like), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    parallel_for(0, rows, ceil_div(kPackGrain, columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t column = transpose ? j : i, rank = transpose ? i : j;
          float value = in[column * padded + rank];
          if (by_column != nullptr) value *= by_column[column];
          if (by_rank != nullptr) value *= by_rank[rank];
          to[i * columns + j] = from_float<T>(value);
        }
    });
  });
  return out;
}

// A vector of any type as float32, padded with zeros.
Tensor padded_vector(const char* op, const char* argument, const Tensor& values, int64_t length) {
  const Tensor row = torch::stable::view(torch::stable::contiguous(values), {1, values.numel()});
  return packed(op, argument, row, nullptr, nullptr, false, 1, length);
}

// [rank, columns] with rows `stride` apart -> strips [ceil(columns / 16), rank, 16], zeros beyond.
Tensor lane_strips(const float* rows, int64_t rank, int64_t stride, int64_t columns) {
  const int64_t strips = ceil_div(columns, kStrip);
  Tensor out = empty({strips, rank, kStrip}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, strips, ceil_div(kPackGrain, rank * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = 0; j < kStrip; ++j) {
          const int64_t column = strip * kStrip + j;
          to[(strip * rank + r) * kStrip + j] = column < columns ? rows[r * stride + column] : 0.0f;
        }
  });
  return out;
}

// The same from m [columns, stride], whose columns are the ranks.
Tensor lane_strips_of_rows(const float* m, int64_t rank, int64_t stride, int64_t columns) {
  const int64_t strips = ceil_div(columns, kStrip);
  Tensor out = empty({strips, rank, kStrip}, ScalarType::Float);
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, strips, ceil_div(kPackGrain, rank * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = 0; j < kStrip; ++j) {
          const int64_t column = strip * kStrip + j;
          to[(strip * rank + r) * kStrip + j] = column < columns ? m[column * stride + r] : 0.0f;
        }
  });
  return out;
}

// ρ [padded rank], zeros beyond the rank.
Tensor rank_scales(const char* op, const Adapter& adapter, int64_t padded) {
  Tensor rho = zeros({padded});
  float* values = rho.mutable_data_ptr<float>();
  Tensor given;
  if (adapter.rank_scale.has_value()) {
    STD_TORCH_CHECK(adapter.rank_scale->numel() == adapter.rank(), op, ": rank_scale has ", adapter.rank_scale->numel(),
                    " elements, wanted ", adapter.rank());
    given = padded_vector(op, "rank_scale", *adapter.rank_scale, padded);
  }
  for (int64_t r = 0; r < adapter.rank(); ++r)
    values[r] = static_cast<float>(adapter.scaling) *
                (adapter.rank_scale.has_value() ? given.const_data_ptr<float>()[r] : 1.0f);
  return rho;
}

struct Sizes {
  int64_t tokens, in, out, rank, padded;
};

Sizes checked_sizes(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter) {
  const int64_t k = weight.in_features(), n = weight.out_features();
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, op, ": x has ", x.dim() >= 1 ? x.size(x.dim() - 1) : 0,
                  " columns, wanted ", k);
  const int64_t rank = adapter.rank();
  if (adapter.low_rank()) {
    STD_TORCH_CHECK(adapter.lora_A->dim() == 2 && adapter.lora_A->size(1) == k, op, ": lora_A has ",
                    adapter.lora_A->numel(), " elements, wanted [R, ", k, "]");
    STD_TORCH_CHECK(adapter.lora_B.has_value() && adapter.lora_B->dim() == 2 && adapter.lora_B->size(0) == n &&
                        adapter.lora_B->size(1) == rank,
                    op, ": lora_B is not [", n, ", ", rank, "]");
  }
  return {rows_of(x), k, n, rank, round_up(rank, kRankStep)};
}

// --- passes over activations -----------------------------------------------------------------------------------------

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout) {
  RowPass pass;
  pass.m = m.const_data_ptr();
  pass.dtype = dtype;
  pass.columns = columns;
  pass.rank = rank;
  pass.dropout = dropout;
  return pass;
}

// Tokens of a chunk whose sums are made together: its number depends on the tokens alone.
int64_t chunk_tokens(int64_t tokens) { return round_up(std::max(kMinChunkTokens, ceil_div(tokens, kMaxChunks)), 8); }

// run(first token, last token, sums) for each chunk into zeroed sums [size]; returns their total, added in order.
template <typename Run>
Tensor sum_chunks(int64_t tokens, int64_t size, const Run& run) {
  if (tokens == 0) return zeros({size});
  const int64_t chunk = chunk_tokens(tokens), chunks = ceil_div(tokens, chunk);
  Tensor sums = empty({chunks, size}, ScalarType::Float);
  float* data = sums.mutable_data_ptr<float>();
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      memset(data + c * size, 0, static_cast<size_t>(size) * sizeof(float));
      run(c * chunk, min_i64((c + 1) * chunk, tokens), data + c * size);
    }
  });
  parallel_for(0, size, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) data[i] += data[c * size + i];
  });
  return torch::stable::select(sums, 0, 0);
}

// Runs a pass without `left` over all tokens.
void run_row_pass(const RowPass& pass, int64_t tokens) {
  const LoraKernels& isa = kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.row_pass(pass, begin, end); });
}

// Runs a pass with `left` (null only where there are no tokens): its sums [columns, rank].
Tensor run_outer_pass(const RowPass& pass, int64_t tokens) {
  const LoraKernels& isa = kernels();
  const Tensor sums = sum_chunks(tokens, pass.columns * pass.rank, [&](int64_t first, int64_t last, float* out) {
    RowPass part = pass;
    part.acc = out;
    isa.row_pass(part, first, last);
  });
  return torch::stable::view(sums, {pass.columns, pass.rank});
}

void run_expand(const Expand& work, int64_t tokens) {
  const LoraKernels& isa = kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.expand(work, begin, end); });
}

struct KeepBits {
  Tensor words;  // int32 storage as float32: stable tensors of few types are made here
  int64_t per_row = 0;
  uint32_t* data = nullptr;
};

KeepBits keep_bits(int64_t tokens, int64_t columns) {
  KeepBits keep;
  keep.per_row = ceil_div(columns, 32);
  keep.words = empty({tokens, keep.per_row}, ScalarType::Float);
  keep.data = static_cast<uint32_t*>(keep.words.mutable_data_ptr());
  return keep;
}

// The mask, made alone.
KeepBits kept(const Dropout& dropout, int64_t tokens, int64_t columns) {
  KeepBits keep = keep_bits(tokens, columns);
  const KeepMask mask{dropout, columns, keep.per_row, keep.data};
  const LoraKernels& isa = kernels();
  parallel_for(0, tokens, kTokenGrain, [&](int64_t begin, int64_t end) { isa.keep_mask(mask, begin, end); });
  return keep;
}

// --- the frozen product ----------------------------------------------------------------------------------------------

bool tiles_take(const FrozenWeight& weight, ScalarType type, int64_t tokens, bool forward) {
  if (type != ScalarType::BFloat16 || tile_kernels() == nullptr || tokens == 0) return false;
  if (weight.is_nf4()) return !forward || !skinny_takes(weight, type, tokens);
  return weight.weight.is_contiguous() && tokens >= kDenseTileTokens;
}

TileWeight tile_weight(const FrozenWeight& weight) {
  TileWeight out;
  out.rows = weight.out_features();
  out.columns = weight.in_features();
  out.block_shift = weight.is_nf4() ? __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize)) : 0;
  out.dense = weight.is_nf4() ? nullptr : static_cast<const bf16*>(weight.weight.const_data_ptr());
  out.packed = weight.is_nf4() ? weight.weight.const_data_ptr<uint8_t>() : nullptr;
  out.absmax = weight.is_nf4() ? all_scales(weight) : nullptr;
  return out;
}

// Activations [rows, columns] and what dropout keeps of them, as tiles take W.
TileWeight tile_tokens(const Tensor& m, int64_t rows, int64_t columns, const KeepBits* keep) {
  TileWeight out;
  out.rows = rows;
  out.columns = columns;
  out.block_shift = 0;
  out.dense = static_cast<const bf16*>(m.const_data_ptr());
  out.packed = nullptr;
  out.absmax = nullptr;
  out.keep = keep != nullptr ? keep->data : nullptr;
  out.keep_words = keep != nullptr ? keep->per_row : 0;
  return out;
}

// [tokens, depth] as strips, into a scratch of the calling thread.
bf16* token_strips(Scratch use, bool left, const Tensor& m, int64_t tokens, int64_t depth, const float* scale,
                   const KeepBits* keep) {
  const size_t bytes = static_cast<size_t>(strips_elements(tokens, depth)) * sizeof(bf16);
  TokenStrips work;
  work.m = static_cast<const bf16*>(m.const_data_ptr());
  work.tokens = tokens;
  work.depth = depth;
  work.scale = scale;
  work.keep = keep != nullptr ? keep->data : nullptr;
  work.keep_words = keep != nullptr ? keep->per_row : 0;
  work.strips = static_cast<bf16*>(scratch(use, bytes));
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(tokens, kStrip), 1,
               [&](int64_t begin, int64_t end) { (left ? isa.left_strips : isa.right_strips)(work, begin, end); });
  return work.strips;
}

bf16* panel_scratch(int64_t depth) {
  const size_t elements = static_cast<size_t>(strips_elements(kPanelStep, depth));
  return static_cast<bf16*>(scratch(Scratch::kPanel, elements * sizeof(bf16)));
}

// run(begin, end, first strip, last strip, panel) over panels of W by runs of token strips, over all threads.
// strip_step: strips that stay together.
template <typename Run>
void run_panels(int64_t count, int64_t depth, int64_t tokens, int64_t strip_step, const Run& run) {
  const int64_t threads = torch::stable::get_num_threads(), strips = ceil_div(tokens, kStrip);
  const int64_t panels = ceil_div(count, kPanelStep);
  // The fewest splits of the tokens, each of which decodes its panel again, that leave no thread idle for more than
  // 1/32 of the time.
  int64_t splits = 1, together = strips;
  while (ceil_div(panels * splits, threads) * threads * 32 > panels * splits * 33 && together > 4 * strip_step) {
    together = round_up(ceil_div(strips, splits + 1), strip_step);
    splits = ceil_div(strips, together);
  }
  parallel_for(0, panels * splits, 1, [&](int64_t begin, int64_t end) {
    bf16* panel = panel_scratch(depth);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / splits * kPanelStep, strip = i % splits * together;
      run(row, min_i64(row + kPanelStep, count), strip, min_i64(strip + together, strips), panel);
    }
  });
}

// Whether the rank's own products run on the tiles: where a tile's product is so much faster than a vector's.
bool ranks_on_tiles() { return current_isa() >= Isa::kAmx; }

// m [rows, columns] float32 as bfloat16 terms that add up to it, transposed: [terms, columns, rows]. An infinity or a
// NaN is its first term.
Tensor split_terms(const float* m, int64_t rows, int64_t columns, int terms) {
  Tensor out = empty({terms, columns, rows}, ScalarType::BFloat16);
  auto* to = static_cast<bf16*>(out.mutable_data_ptr());
  parallel_for(0, rows, ceil_div(kPackGrain, columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float rest = m[i * columns + j];
        for (int64_t term = 0; term < terms; ++term) {
          const bf16 value = from_float<bf16>(rest);
          to[(term * columns + j) * rows + i] = value;
          rest -= to_float(value);
          if (!(rest - rest == 0.0f)) rest = 0.0f;
        }
      }
  });
  return out;
}

// The terms of a product's two sides, set side by side over the depth so that one product sums them: hi hi + hi lo +
// lo hi, 16 bits of each. m [rows, stride], its first `rank` columns -> [rows, 3 rank].
Tensor split_depth(const float* m, int64_t rows, int64_t rank, int64_t stride, bool left) {
  Tensor out = empty({rows, 3 * rank}, ScalarType::BFloat16);
  auto* to = static_cast<bf16*>(out.mutable_data_ptr());
  parallel_for(0, rows, ceil_div(kPackGrain, rank + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < rank; ++j) {
        const float value = m[i * stride + j];
        const bf16 high = from_float<bf16>(value);
        const float rest = value - to_float(high);
        const bf16 low = from_float<bf16>(rest - rest == 0.0f ? rest : 0.0f);
        bf16* row = to + i * 3 * rank + j;
        row[0] = high;
        row[rank] = left ? high : low;
        row[2 * rank] = left ? low : high;
      }
  });
  return out;
}

// A matrix of bfloat16 [count, depth] as strips, in a tensor of its own.
Tensor strips_tensor(const Tensor& m, int64_t count, int64_t depth, bool left) {
  Tensor out = empty({strips_elements(count, depth)}, ScalarType::BFloat16);
  TokenStrips work{static_cast<const bf16*>(m.const_data_ptr()), count, depth, nullptr, nullptr, 0,
                   static_cast<bf16*>(out.mutable_data_ptr())};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(count, kStrip), 1,
               [&](int64_t begin, int64_t end) { (left ? isa.left_strips : isa.right_strips)(work, begin, end); });
  return out;
}

// Terms [terms, rank, depth] as strips of ranks, the terms of a strip side by side.
Tensor term_strips(const Tensor& split, int terms, int64_t rank, int64_t depth, bool left) {
  Tensor out = empty({terms, strips_elements(rank, depth)}, ScalarType::BFloat16);
  const TileKernels& isa = *tile_kernels();
  const int64_t strips = ceil_div(rank, kStrip);
  const int64_t length = strips_elements(kStrip, depth);
  parallel_for(0, strips * terms, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / terms * kStrip;
      const TokenStrips work{static_cast<const bf16*>(split.const_data_ptr()) + (i % terms * rank + first) * depth,
                             min_i64(kStrip, rank - first),
                             depth,
                             nullptr,
                             nullptr,
                             0,
                             static_cast<bf16*>(out.mutable_data_ptr()) + i * length};
      (left ? isa.left_strips : isa.right_strips)(work, 0, 1);
    }
  });
  return out;
}

// m a [rows, padded rank], where a [columns, padded] float32.
void tile_shrink(const TileWeight& m, const Tensor& a, int terms, float scale, float* out, float* squares) {
  const int64_t padded = a.size(1);
  const Tensor strips =
      term_strips(split_terms(a.const_data_ptr<float>(), m.columns, padded, terms), terms, padded, m.columns, false);
  const TileShrink work{m,   scale,  padded / kStrip, terms, static_cast<const bf16*>(strips.const_data_ptr()),
                        out, squares};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(m.rows, kPanelStep), 1, [&](int64_t begin, int64_t end) {
    bf16* panel = panel_scratch(m.columns);
    for (int64_t i = begin; i < end; ++i)
      isa.shrink(work, i * kPanelStep, min_i64((i + 1) * kPanelStep, m.rows), panel);
  });
}

// mᵀ left [columns, padded rank], where left [rows, padded] float32.
Tensor tile_outer(const TileWeight& m, const float* left, int64_t padded, float scale) {
  const Tensor strips = term_strips(split_terms(left, m.rows, padded, kTerms), kTerms, padded, m.rows, true);
  Tensor out = empty({m.columns, padded}, ScalarType::Float);
  const TileOuter work{m,
                       scale,
                       padded / kStrip,
                       kTerms,
                       static_cast<const bf16*>(strips.const_data_ptr()),
                       out.mutable_data_ptr<float>()};
  const TileKernels& isa = *tile_kernels();
  parallel_for(0, ceil_div(m.columns, kPanelStep), 1, [&](int64_t begin, int64_t end) {
    bf16* panel = panel_scratch(m.rows);
    for (int64_t i = begin; i < end; ++i)
      isa.outer(work, i * kPanelStep, min_i64((i + 1) * kPanelStep, m.columns), panel);
  });
  return out;
}

// W's rows [begin, end) in float32, [end - begin, K].
Tensor wide_rows(const char* op, const FrozenWeight& weight, int64_t begin, int64_t end, ScalarType type) {
  Tensor dense = weight.weight;
  const Tensor rows = weight.is_nf4() ? dequantized_rows(op, weight, begin, end, type)
                                      : torch::stable::narrow(dense, 0, begin, end - begin);
  return torch::stable::to(rows, ScalarType::Float);
}

// Whether PyTorch's product runs in x's own type, where its result is rounded (plain: Y or dX itself) or goes on to be
// scaled. On x86-64 its products of 16-bit types need instructions for them; float32's do not.
bool multiplies_in(ScalarType type, bool plain) {
  if (type == ScalarType::Float || (type == ScalarType::BFloat16 && tile_kernels() != nullptr)) return true;
  return plain && current_isa() == Isa::kScalar;
}

// x [T, K] Wᵀ in float32; x is of W's type, or of float32.
Tensor product_forward(const char* op, const Tensor& x, const FrozenWeight& weight, ScalarType type) {
  const int64_t tokens = x.size(0), n = weight.out_features();
  if (skinny_takes(weight, type, tokens)) return skinny_product(op, torch::stable::to(x, type), weight);
  if (weight.in_features() == 0) return zeros({tokens, n});
  if (multiplies_in(type, false)) {
    Tensor y = empty({tokens, n}, type);
    mm_out(y, torch::stable::to(x, type), transposed(dense_weight(op, weight, type)));
    return torch::stable::to(y, ScalarType::Float);
  }
  const Tensor wide = torch::stable::to(x, ScalarType::Float);
  Tensor y = empty({tokens, n}, ScalarType::Float);
  for (int64_t row = 0; row < n; row += kWidePanel) {
    const int64_t rows = min_i64(kWidePanel, n - row);
    mm_out(torch::stable::narrow(y, 1, row, rows), wide, transposed(wide_rows(op, weight, row, row + rows, type)));
  }
  return y;
}

// g [T, N] W in float32; g is of W's type or of float32.
Tensor product_backward(const char* op, const Tensor& g, const FrozenWeight& weight, ScalarType type) {
  const int64_t tokens = g.size(0), n = weight.out_features(), k = weight.in_features();
  if (n == 0) return zeros({tokens, k});
  if (multiplies_in(type, false)) {
    Tensor y = empty({tokens, k}, type);
    mm_out(y, torch::stable::to(g, type), dense_weight(op, weight, type));
    return torch::stable::to(y, ScalarType::Float);
  }
  Tensor wide = torch::stable::to(g, ScalarType::Float);
  Tensor y = zeros({tokens, k});
  for (int64_t row = 0; row < n; row += kWidePanel) {
    const int64_t rows = min_i64(kWidePanel, n - row);
    addmm_(y, torch::stable::contiguous(torch::stable::narrow(wide, 1, row, rows)),
           wide_rows(op, weight, row, row + rows, type), 1.0);
  }
  return y;
}

// x̃ in x's type, from the mask's bits: for the paths that have no tiles.
Tensor dropped_tokens(const char* op, const Tensor& x, const KeepBits& keep, float scale) {
  const int64_t tokens = x.size(0), d = x.size(1);
  Tensor out = empty({tokens, d}, x.scalar_type());
  with_dtype(dtype_of(op, "x", x), [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    parallel_for(0, tokens, ceil_div(kPackGrain, d + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t i = 0; i < d; ++i) {
          const bool kept = keep.data[t * keep.per_row + i / 32] >> (i % 32) & 1;
          to[t * d + i] = from_float<T>(kept ? scale * to_float(in[t * d + i]) : 0.0f);
        }
    });
  });
  return out;
}

}  // namespace

// --- forward ---------------------------------------------------------------------------------------------------------

namespace {

void run_few_tokens(const char* op, const Tensor& w, const Tensor& x, const Tensor& y, bool accumulate) {
  FewTokens work;
  work.w = w.const_data_ptr();
  work.dtype = dtype_of(op, "weight", w);
  work.rows = w.size(0);
  work.columns = w.size(1);
  work.tokens = x.size(0);
  work.x = x.const_data_ptr<float>();
  work.y = y.mutable_data_ptr<float>();
  work.accumulate = accumulate;
  const LoraKernels& isa = kernels();
  parallel_for(0, work.rows, ceil_div(kPackGrain, work.columns * work.tokens),
               [&](int64_t begin, int64_t end) { isa.few_tokens(work, begin, end); });
}

// x is [T, K] of W's type. Fills y, s and z.
void forward_few_tokens(const char* op, const Tensor& x, const FrozenWeight& weight, const Adapter& adapter,
                        Expand finish, const AdaptedForward& out) {
  const ScalarType type = x.scalar_type();
  const int64_t tokens = x.size(0), n = weight.out_features(), rank = adapter.rank();
  const Tensor wide = torch::stable::to(x, ScalarType::Float);
  Tensor scaled = wide;
  if (adapter.in_scale.has_value()) scaled = column_pass(op, wide, &*adapter.in_scale, 0.0f, nullptr).scaled;
  Tensor base;
  if (weight.is_nf4()) {
    base = skinny_product(op, torch::stable::to(scaled, type), weight);
  } else {
    base = empty({tokens, n}, ScalarType::Float);
    run_few_tokens(op, weight.weight, scaled, base, false);
  }
  if (adapter.low_rank()) {
    run_few_tokens(op, torch::stable::contiguous(*adapter.lora_A), wide, out.s, false);
    const Tensor rho = rank_scales(op, adapter, rank);
    const Tensor left = column_pass(op, out.s, &rho, 0.0f, nullptr).scaled;
    run_few_tokens(op, torch::stable::contiguous(*adapter.lora_B), left, base, true);
  }
  finish.before = base.const_data_ptr<float>();
  finish.rank = 0;
  run_expand(finish, tokens);
}

// Whether forward_few_tokens is the way: no mask to make, and a weight that can be read row by row.
bool few_tokens_take(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Adapter& adapter) {
  if (adapter.dropout.active || weight.in_features() == 0) return false;
  if (weight.is_nf4()) return skinny_takes(weight, type, tokens);
  return tokens <= kFewTokens && weight.weight.is_contiguous();
}

}  // namespace

AdaptedForward adapted_forward(const char* op, Tensor x, const FrozenWeight& weight, const std::optional<Tensor>& bias,
                               const Adapter& adapter, bool bias_inside, bool want_z) {
  const Sizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  const DType dtype = dtype_of(op, "x", x);
  x = torch::stable::contiguous(x);
  AdaptedForward out;
  out.y = empty(with_last(x, size.out), type);
  out.s = adapter.low_rank() ? empty({size.tokens, size.rank}, ScalarType::Float) : none();
  out.z = want_z ? empty({size.tokens, size.out}, type) : none(type);
  if (bias.has_value())
    STD_TORCH_CHECK(bias->numel() == size.out, op, ": bias has ", bias->numel(), " elements, wanted ", size.out);
  if (size.tokens == 0) return out;
  Tensor flat_x = torch::stable::view(x, {size.tokens, size.in});
  const bool few = few_tokens_take(weight, type, size.tokens, adapter);
  const bool tiles = !few && tiles_take(weight, type, size.tokens, true) && size.in > 0;

  // S, and the mask's bits where the base is dropped too.
  KeepBits keep;
  const bool drop_base = adapter.drop_base && adapter.dropout.active;
  Tensor s_padded;
  if (adapter.low_rank() && !few) {
    const Tensor right_a = packed(op, "lora_A", *adapter.lora_A, nullptr, nullptr, true, size.in, size.padded);
    s_padded = size.padded == size.rank ? out.s : empty({size.tokens, size.padded}, ScalarType::Float);
    float* s_data = s_padded.mutable_data_ptr<float>();
    if (tiles && ranks_on_tiles()) {
      if (adapter.dropout.active) keep = kept(adapter.dropout, size.tokens, size.in);
      tile_shrink(tile_tokens(x, size.tokens, size.in, adapter.dropout.active ? &keep : nullptr), right_a, kTerms,
                  adapter.dropout.scale, s_data, nullptr);
    } else {
      RowPass pass = make_row_pass(x, dtype, size.in, size.padded, adapter.dropout);
      pass.right = right_a.const_data_ptr<float>();
      pass.out = s_data;
      if (drop_base) {
        keep = keep_bits(size.tokens, size.in);
        pass.keep = keep.data;
        pass.keep_words = keep.per_row;
      }
      if (size.in == 0) memset(s_data, 0, static_cast<size_t>(s_padded.numel()) * sizeof(float));
      run_row_pass(pass, size.tokens);
    }
    if (size.padded != size.rank) torch::stable::copy_(out.s, torch::stable::narrow(s_padded, 1, 0, size.rank));
  }
  if (size.out == 0) return out;

  const int64_t stride = round_up(size.out, kColumnStep);
  std::optional<Tensor> wide_bias, wide_scale, rho;
  if (bias.has_value()) wide_bias = padded_vector(op, "bias", *bias, stride);
  if (adapter.out_scale.has_value()) wide_scale = padded_vector(op, "out_scale", *adapter.out_scale, stride);
  if (adapter.low_rank() && !few) rho = rank_scales(op, adapter, size.padded);

  if (tiles) {
    TileForward work;
    work.weight = tile_weight(weight);
    work.tokens = size.tokens;
    work.x = token_strips(Scratch::kTokens, false, flat_x, size.tokens, size.in, floats(adapter.in_scale), nullptr);
    work.dropped =
        drop_base ? token_strips(Scratch::kMoreTokens, false, flat_x, size.tokens, size.in, nullptr, &keep) : nullptr;
    work.dropped_scale = adapter.dropout.scale;
    work.rank = ranks_on_tiles() ? 0 : size.rank;
    Tensor strips, rows;
    if (adapter.low_rank() && ranks_on_tiles()) {
      const Tensor b = packed(op, "lora_B", *adapter.lora_B, nullptr, floats(rho), false, size.out, size.rank);
      work.rank_depth = 3 * size.rank;
      strips = strips_tensor(split_depth(s_padded.const_data_ptr<float>(), size.tokens, size.rank, size.padded, false),
                             size.tokens, work.rank_depth, false);
      rows = strips_tensor(split_depth(b.const_data_ptr<float>(), size.out, size.rank, size.rank, true), size.out,
                           work.rank_depth, true);
      work.s_strips = static_cast<const bf16*>(strips.const_data_ptr());
      work.b_strips = static_cast<const bf16*>(rows.const_data_ptr());
    } else if (adapter.low_rank()) {
      strips = lane_strips_of_rows(s_padded.const_data_ptr<float>(), size.rank, size.padded, size.tokens);
      rows = packed(op, "lora_B", *adapter.lora_B, nullptr, floats(rho), false, stride, size.rank);
    }
    work.s = work.rank > 0 ? strips.const_data_ptr<float>() : nullptr;
    work.b = work.rank > 0 ? rows.const_data_ptr<float>() : nullptr;
    work.scale = floats(wide_scale);
    work.bias_before = bias_inside ? floats(wide_bias) : nullptr;
    work.bias = bias_inside ? nullptr : floats(wide_bias);
    work.y = static_cast<bf16*>(out.y.mutable_data_ptr());
    work.z = want_z ? static_cast<bf16*>(out.z.mutable_data_ptr()) : nullptr;
    const TileKernels& isa = *tile_kernels();
    run_panels(size.out, size.in, size.tokens, 2,
               [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
                 isa.forward(work, begin, end, first, last, panel);
               });
    return out;
  }

  Expand work;
  work.y = out.y.mutable_data_ptr();
  work.z = want_z ? out.z.mutable_data_ptr() : nullptr;
  work.dtype = dtype;
  work.columns = size.out;
  work.rank = size.padded;
  work.stride = stride;
  work.scale = floats(wide_scale);
  (bias_inside ? work.bias_before : work.bias) = floats(wide_bias);
  if (few) {
    forward_few_tokens(op, flat_x, weight, adapter, work, out);
    return out;
  }
  Tensor right_b;
  if (adapter.low_rank()) {
    right_b = packed(op, "lora_B", *adapter.lora_B, nullptr, floats(rho), true, size.padded, stride);
    work.left = s_padded.const_data_ptr<float>();
    work.right = right_b.const_data_ptr<float>();
  }
  const bool plain = !wide_scale.has_value() && !want_z && !drop_base;
  const bool in_place = plain && multiplies_in(type, true) && !skinny_takes(weight, type, size.tokens);
  if (adapter.in_scale.has_value()) {
    // Where the product is float32's anyhow, l ∘ x is not rounded before it.
    if (!in_place && !multiplies_in(type, false)) flat_x = torch::stable::to(flat_x, ScalarType::Float);
    flat_x = column_pass(op, flat_x, &*adapter.in_scale, 0.0f, nullptr).scaled;
  }
  if (in_place) {
    // The product accumulates onto the other terms, so that nothing of size T x N is read or written but Y.
    const Tensor flat_y = torch::stable::view(out.y, {size.tokens, size.out});
    const bool terms = adapter.low_rank() || wide_bias.has_value() || size.in == 0;
    if (terms) run_expand(work, size.tokens);
    if (size.in > 0) {
      const Tensor dense = transposed(dense_weight(op, weight, type));
      if (terms)
        addmm_(flat_y, flat_x, dense, 1.0);
      else
        mm_out(flat_y, flat_x, dense);
    }
    return out;
  }
  const Tensor base = product_forward(op, flat_x, weight, type);
  Tensor before = base, after;
  if (drop_base) {
    before = product_forward(op, dropped_tokens(op, flat_x, keep, adapter.dropout.scale), weight, type);
    after = torch::stable::subtract(base, before);
    work.after = after.const_data_ptr<float>();
  }
  work.before = before.const_data_ptr<float>();
  run_expand(work, size.tokens);
  return out;
}

// --- backward --------------------------------------------------------------------------------------------------------

AdaptedBackward adapted_backward(const char* op, Tensor grad, std::optional<Tensor> given_x, const FrozenWeight& weight,
                                 const Adapter& adapter, const std::optional<Tensor>& s, bool needs_grad_x) {
  // Only the adapters' gradients are made of x.
  Tensor x = given_x.has_value() ? torch::stable::contiguous(*given_x)
                                 : empty(with_last(grad, weight.in_features()), grad.scalar_type());
  const Sizes size = checked_sizes(op, x, weight, adapter);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(grad.numel() == size.tokens * size.out && grad.scalar_type() == type, op, ": grad has ", grad.numel(),
                  " elements of ", torch::headeronly::toString(grad.scalar_type()), ", wanted ", size.tokens * size.out,
                  " of ", torch::headeronly::toString(type));
  const DType dtype = dtype_of(op, "x", x);
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  AdaptedBackward out;
  out.grad_x = none(type);
  out.grad_A = out.grad_B = out.grad_rank_scale = out.grad_in_scale = none();

  const bool mask = adapter.dropout.active && adapter.low_rank();
  const bool drop_base = adapter.drop_base && mask;
  const bool wants_x = needs_grad_x || adapter.in_scale.has_value();
  const float* g = floats(adapter.out_scale);
  KeepBits keep;
  Tensor p;
  if (adapter.low_rank()) {
    STD_TORCH_CHECK(s.has_value() && s->scalar_type() == ScalarType::Float && s->numel() == size.tokens * size.rank, op,
                    ": s has ", s.has_value() ? s->numel() : 0, " elements, wanted ", size.tokens * size.rank);
    const Tensor rho = rank_scales(op, adapter, size.padded);
    const Tensor flat_s = torch::stable::view(torch::stable::contiguous(*s), {size.tokens, size.rank});
    const Tensor left_s =
        size.rank == size.padded ? flat_s : packed(op, "s", flat_s, nullptr, nullptr, false, size.tokens, size.padded);
    const Tensor right_b =
        packed(op, "lora_B", *adapter.lora_B, g, rho.const_data_ptr<float>(), false, size.out, size.padded);
    // The tiles read whole strips of P; what is beyond the last token is multiplied and not stored.
    p = empty({round_up(size.tokens, 2 * kStrip), size.padded}, ScalarType::Float);
    float* p_data = p.mutable_data_ptr<float>();
    const int64_t written = size.out > 0 ? size.tokens : 0;
    memset(p_data + written * size.padded, 0, static_cast<size_t>(p.numel() - written * size.padded) * sizeof(float));
    const bool on_tiles = type == ScalarType::BFloat16 && ranks_on_tiles() && size.tokens > 0;
    Tensor sums_a, sums_b;
    if (on_tiles) {
      const TileWeight tile_grad = tile_tokens(grad, size.tokens, size.out, nullptr);
      if (size.out > 0) tile_shrink(tile_grad, right_b, kTerms, 1.0f, p_data, nullptr);
      sums_b = tile_outer(tile_grad, left_s.const_data_ptr<float>(), size.padded, 1.0f);
      if (mask) keep = kept(adapter.dropout, size.tokens, size.in);
      sums_a = tile_outer(tile_tokens(x, size.tokens, size.in, mask ? &keep : nullptr), p_data, size.padded,
                          adapter.dropout.scale);
    } else {
      RowPass over_grad = make_row_pass(grad, dtype, size.out, size.padded, Dropout());
      over_grad.right = right_b.const_data_ptr<float>();
      over_grad.out = p_data;
      over_grad.left = left_s.const_data_ptr<float>();
      sums_b = run_outer_pass(over_grad, size.tokens);
      RowPass over_x = make_row_pass(x, dtype, size.in, size.padded, adapter.dropout);
      over_x.left = p_data;
      if (mask && needs_grad_x) {
        keep = keep_bits(size.tokens, size.in);
        over_x.keep = keep.data;
        over_x.keep_words = keep.per_row;
      }
      sums_a = run_outer_pass(over_x, size.tokens);
    }
    out.grad_B = unpacked(op, "lora_B", sums_b, g, rho.const_data_ptr<float>(), false, *adapter.lora_B);
    if (adapter.rank_scale.has_value()) {
      const Tensor wide_b = packed(op, "lora_B", *adapter.lora_B, g, nullptr, false, size.out, size.padded);
      const Tensor dots = column_pass(op, wide_b, nullptr, 0.0f, &sums_b).sums;
      out.grad_rank_scale = zeros({size.rank});
      for (int64_t r = 0; r < size.rank; ++r)
        out.grad_rank_scale.mutable_data_ptr<float>()[r] =
            static_cast<float>(adapter.scaling) * dots.const_data_ptr<float>()[r];
    }
    out.grad_A = unpacked(op, "lora_A", sums_a, nullptr, nullptr, true, *adapter.lora_A);
  }
  if (adapter.in_scale.has_value()) out.grad_in_scale = zeros({size.in});
  if (!wants_x) return out;
  out.grad_x = empty({x.sizes().begin(), x.sizes().end()}, type);
  if (out.grad_x.numel() == 0) return out;

  const Tensor flat_grad = torch::stable::view(grad, {size.tokens, size.out});
  const Tensor flat_x = torch::stable::view(x, {size.tokens, size.in});
  const int64_t stride = round_up(size.in, kColumnStep);
  Tensor right_a;
  if (adapter.low_rank()) right_a = packed(op, "lora_A", *adapter.lora_A, nullptr, nullptr, false, size.padded, stride);

  if (tiles_take(weight, type, size.tokens, false) && size.out > 0) {
    TileBackward work;
    work.weight = tile_weight(weight);
    work.tokens = size.tokens;
    const float* scale = drop_base ? nullptr : g;
    work.grad = token_strips(Scratch::kTokens, true, flat_grad, size.tokens, size.out, scale, nullptr);
    work.more = nullptr;
    if (drop_base && g != nullptr) {
      Tensor shifted = empty({size.out}, ScalarType::Float);
      for (int64_t i = 0; i < size.out; ++i) shifted.mutable_data_ptr<float>()[i] = g[i] - 1.0f;
      work.more = token_strips(Scratch::kMoreTokens, true, flat_grad, size.tokens, size.out, floats(shifted), nullptr);
    }
    work.rank = ranks_on_tiles() ? 0 : size.padded;
    Tensor strips, rows;
    if (adapter.low_rank() && ranks_on_tiles()) {
      const Tensor a = packed(op, "lora_A", *adapter.lora_A, nullptr, nullptr, true, size.in, size.rank);
      work.rank_depth = 3 * size.rank;
      rows = strips_tensor(split_depth(p.const_data_ptr<float>(), size.tokens, size.rank, size.padded, true),
                           size.tokens, work.rank_depth, true);
      strips = strips_tensor(split_depth(a.const_data_ptr<float>(), size.in, size.rank, size.rank, false), size.in,
                             work.rank_depth, false);
      work.p_strips = static_cast<const bf16*>(rows.const_data_ptr());
      work.a_strips = static_cast<const bf16*>(strips.const_data_ptr());
    } else if (adapter.low_rank()) {
      strips = lane_strips(right_a.const_data_ptr<float>(), size.padded, stride, size.in);
    }
    work.p = work.rank > 0 ? p.const_data_ptr<float>() : nullptr;
    work.a = work.rank > 0 ? strips.const_data_ptr<float>() : nullptr;
    work.keep = mask ? keep.data : nullptr;
    work.keep_words = keep.per_row;
    work.keep_scale = adapter.dropout.scale;
    work.in_scale = floats(adapter.in_scale);
    work.x = static_cast<const bf16*>(x.const_data_ptr());
    Tensor sums;
    if (adapter.in_scale.has_value()) sums = zeros({ceil_div(size.tokens, kReduceTokens), size.in});
    work.grad_in_scale = adapter.in_scale.has_value() ? sums.mutable_data_ptr<float>() : nullptr;
    work.grad_x = static_cast<bf16*>(out.grad_x.mutable_data_ptr());
    const TileKernels& isa = *tile_kernels();
    run_panels(size.in, size.out, size.tokens, adapter.in_scale.has_value() ? kReduceTokens / kStrip : 2,
               [&](int64_t begin, int64_t end, int64_t first, int64_t last, bf16* panel) {
                 isa.backward(work, begin, end, first, last, panel);
               });
    if (adapter.in_scale.has_value())
      for (int64_t c = 0; c < sums.size(0); ++c)
        for (int64_t i = 0; i < size.in; ++i)
          out.grad_in_scale.mutable_data_ptr<float>()[i] += sums.const_data_ptr<float>()[c * size.in + i];
    return out;
  }

  Expand work;
  work.y = out.grad_x.mutable_data_ptr();
  work.dtype = dtype;
  work.columns = size.in;
  work.rank = size.padded;
  work.stride = stride;
  work.dropout = mask ? adapter.dropout : Dropout();
  if (adapter.low_rank()) {
    work.left = p.const_data_ptr<float>();
    work.right = right_a.const_data_ptr<float>();
  }
  const bool in_place = !adapter.in_scale.has_value() && !drop_base && multiplies_in(type, g == nullptr);
  // Where the product is float32's anyhow, g ∘ dY is not rounded before it.
  const Tensor wide_grad =
      g == nullptr || multiplies_in(type, false) ? flat_grad : torch::stable::to(flat_grad, ScalarType::Float);
  const Tensor scaled =
      g == nullptr || drop_base ? flat_grad : column_pass(op, wide_grad, &*adapter.out_scale, 0.0f, nullptr).scaled;
  if (in_place) {
    const Tensor flat_grad_x = torch::stable::view(out.grad_x, {size.tokens, size.in});
    const bool terms = adapter.low_rank() || size.out == 0;
    if (terms) run_expand(work, size.tokens);
    if (size.out > 0) {
      if (terms)
        addmm_(flat_grad_x, scaled, dense_weight(op, weight, type), 1.0);
      else
        mm_out(flat_grad_x, scaled, dense_weight(op, weight, type));
    }
    return out;
  }
  Tensor before, after, wide_scale;
  if (drop_base) {
    before = product_backward(op, column_pass(op, wide_grad, &*adapter.out_scale, -1.0f, nullptr).scaled, weight, type);
    work.before = before.const_data_ptr<float>();
    after = product_backward(op, flat_grad, weight, type);
    work.after = after.const_data_ptr<float>();
  } else if (adapter.in_scale.has_value()) {
    before = product_backward(op, scaled, weight, type);
    out.grad_in_scale = torch::stable::view(column_pass(op, flat_x, nullptr, 0.0f, &before).sums, {size.in});
    wide_scale = padded_vector(op, "in_scale", *adapter.in_scale, stride);
    work.before = before.const_data_ptr<float>();
    work.scale = wide_scale.const_data_ptr<float>();
  } else {
    after = product_backward(op, scaled, weight, type);
    work.after = after.const_data_ptr<float>();
  }
  run_expand(work, size.tokens);
  return out;
}

// --- reductions and passes over W ------------------------------------------------------------------------------------

Dropout make_dropout(const char* op, double p, const std::optional<Tensor>& seed) {
  Dropout dropout;
  if (!seed.has_value()) return dropout;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2, op, ": seed is ",
                  torch::headeronly::toString(seed->scalar_type()), " with ", seed->numel(),
                  " elements, wanted Long with 2");
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p is ", p, ", wanted 0 <= p < 1");
  const Tensor held = torch::stable::contiguous(*seed);
  const int64_t* words = held.const_data_ptr<int64_t>();
  dropout.active = true;
  dropout.seed = static_cast<uint64_t>(words[0]);
  dropout.offset = static_cast<uint64_t>(words[1]);
  dropout.threshold = static_cast<uint32_t>(__builtin_nearbyint(p * 65536.0));
  dropout.scale = static_cast<float>(1.0 / (1.0 - p));
  return dropout;
}

ColumnSums column_pass(const char* op, const Tensor& m, const Tensor* scale, float shift, const Tensor* other) {
  const int64_t columns = m.size(m.dim() - 1), tokens = rows_of(m);
  const Tensor held = torch::stable::contiguous(m);
  Tensor held_other;
  ColumnPass pass;
  pass.m = held.const_data_ptr();
  pass.dtype = dtype_of(op, "x", held);
  pass.columns = columns;
  ColumnSums result{none(m.scalar_type()), none()};
  if (scale != nullptr) {
    result.scaled = empty({m.sizes().begin(), m.sizes().end()}, m.scalar_type());
    pass.out = result.scaled.mutable_data_ptr();
    pass.scale = scale->const_data_ptr<float>();
    pass.shift = shift;
  }
  const LoraKernels& isa = kernels();
  if (other == nullptr) {
    parallel_for(0, tokens, ceil_div(kPackGrain, columns + 1),
                 [&](int64_t begin, int64_t end) { isa.column_pass(pass, begin, end); });
    return result;
  }
  STD_TORCH_CHECK(other->numel() == m.numel(), op, ": sizes ", m.numel(), " and ", other->numel(), " differ");
  held_other = torch::stable::contiguous(*other);
  pass.other = held_other.const_data_ptr();
  pass.other_dtype = dtype_of(op, "x", held_other);
  result.sums = sum_chunks(tokens, columns, [&](int64_t first, int64_t last, float* sums) {
    ColumnPass part = pass;
    part.sums = sums;
    isa.column_pass(part, first, last);
  });
  return result;
}

namespace {

// W's rows [first, last) in `type`, by the calling thread: where they lie, or decoded into its scratch.
const void* weight_rows(const FrozenWeight& weight, const Tensor& dense, ScalarType type, int64_t first, int64_t last) {
  const int64_t k = weight.in_features(), width = type == ScalarType::Float ? 4 : 2;
  if (!weight.is_nf4()) return static_cast<const char*>(dense.const_data_ptr()) + first * k * width;
  const size_t room = static_cast<size_t>(((last - first) * k + 2 * weight.blocksize) * width);
  return dequantize_range(weight, first * k, last * k, dtype_of("nf4_dequantize", "dtype", type),
                          scratch(Scratch::kRows, room));
}

RowPass weight_pass(const char* op, const FrozenWeight& weight, ScalarType type, int64_t padded) {
  RowPass pass;
  pass.dtype = dtype_of(op, "dtype", type);
  pass.columns = weight.in_features();
  pass.rank = padded;
  return pass;
}

}  // namespace

RowFacts weight_row_facts(const char* op, const FrozenWeight& weight, const Tensor& lora_A, ScalarType type) {
  const int64_t n = weight.out_features(), k = weight.in_features(), padded = round_up(lora_A.size(0), kRankStep);
  RowFacts facts{zeros({n, padded}), zeros({n})};
  if (n == 0 || k == 0) return facts;
  const Tensor right = packed(op, "lora_A", lora_A, nullptr, nullptr, true, k, padded);
  if (type == ScalarType::BFloat16 && ranks_on_tiles() && (weight.is_nf4() || weight.weight.is_contiguous())) {
    tile_shrink(tile_weight(weight), right, kTerms, 1.0f, facts.product.mutable_data_ptr<float>(),
                facts.squares.mutable_data_ptr<float>());
    return facts;
  }
  const Tensor dense = weight.is_nf4() ? Tensor() : torch::stable::contiguous(weight.weight);
  const LoraKernels& isa = kernels();
  parallel_for(0, ceil_div(n, kRowChunk), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRowChunk; first < min_i64(end * kRowChunk, n); first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, n);
      RowPass pass = weight_pass(op, weight, type, padded);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.right = right.const_data_ptr<float>();
      pass.out = facts.product.mutable_data_ptr<float>() + first * padded;
      pass.squares = facts.squares.mutable_data_ptr<float>() + first;
      isa.row_pass(pass, 0, last - first);
    }
  });
  return facts;
}

Tensor weight_outer(const char* op, const FrozenWeight& weight, const Tensor& left, ScalarType type) {
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = left.size(1);
  const int64_t padded = round_up(rank, kRankStep);
  if (n == 0 || k == 0) return zeros({rank, k});
  const Tensor framed = packed(op, "left", left, nullptr, nullptr, false, n, padded);
  const Tensor dense = weight.is_nf4() ? Tensor() : torch::stable::contiguous(weight.weight);
  const LoraKernels& isa = kernels();
  const Tensor sums = sum_chunks(n, k * padded, [&](int64_t begin, int64_t end, float* out) {
    for (int64_t first = begin; first < end; first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, end);
      RowPass pass = weight_pass(op, weight, type, padded);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.left = framed.const_data_ptr<float>() + first * padded;
      pass.acc = out;
      isa.row_pass(pass, 0, last - first);
    }
  });
  const Tensor like = empty({rank, k}, ScalarType::Float);
  return unpacked(op, "left", torch::stable::view(sums, {k, padded}), nullptr, nullptr, true, like);
}

std::vector<float> row_products(const char* op, const Tensor& grad, const Tensor& x, const FrozenWeight& weight,
                                const std::vector<int64_t>& rows) {
  const int64_t tokens = rows_of(x), n = weight.out_features(), k = weight.in_features();
  std::vector<float> products(rows.size(), 0.0f);
  if (tokens == 0 || k == 0 || rows.empty()) return products;
  const Tensor held_grad = torch::stable::contiguous(grad), held_x = torch::stable::contiguous(x);
  const Tensor dense = weight.is_nf4() ? Tensor() : torch::stable::contiguous(weight.weight);
  const ScalarType type = x.scalar_type();
  // kRankStep rows at a time: their columns of dY, gathered, against x, give a row of dYᵀ x each.
  for (size_t first = 0; first < rows.size(); first += kRankStep) {
    const auto count = static_cast<int64_t>(std::min<size_t>(kRankStep, rows.size() - first));
    Tensor left = zeros({tokens, kRankStep});
    float* to = left.mutable_data_ptr<float>();
    with_dtype(dtype_of(op, "grad", held_grad), [&](auto zero) {
      const auto* in = static_cast<const decltype(zero)*>(held_grad.const_data_ptr());
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < count; ++i)
          to[t * kRankStep + i] = to_float(in[t * n + rows[first + static_cast<size_t>(i)]]);
    });
    RowPass pass = make_row_pass(held_x, dtype_of(op, "x", held_x), k, kRankStep, Dropout());
    pass.left = to;
    const Tensor sums = run_outer_pass(pass, tokens);
    const float* data = sums.const_data_ptr<float>();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = rows[first + static_cast<size_t>(i)];
      const void* values = weight_rows(weight, dense, type, at, at + 1);
      double total = 0.0;
      with_dtype(dtype_of(op, "weight", type), [&](auto zero) {
        const auto* in = static_cast<const decltype(zero)*>(values);
        for (int64_t j = 0; j < k; ++j) total += static_cast<double>(to_float(in[j])) * data[j * kRankStep + i];
      });
      products[first + static_cast<size_t>(i)] = static_cast<float>(total);
    }
  }
  return products;
}

Tensor frozen_backward(const char* op, Tensor grad, const FrozenWeight& weight) {
  return adapted_backward(op, grad, std::nullopt, weight, Adapter(), std::nullopt, true).grad_x;
}

Tensor float_vector(const char* op, const char* argument, const Tensor& values, int64_t numel) {
  STD_TORCH_CHECK(values.numel() == numel, op, ": ", argument, " has ", values.numel(), " elements, wanted ", numel);
  return torch::stable::view(padded_vector(op, argument, values, numel), {numel});
}

}  // namespace peft_ext
