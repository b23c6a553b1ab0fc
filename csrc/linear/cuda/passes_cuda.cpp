// Defines the host functions of passes.cuh, which plan the grid of a pass over activations or over W, allocate partial
// sums, and select and launch the kernel. The kernels are in rank_pass.cuh, expand.cuh and columns.cuh. See passes.cuh.
#include "linear/cuda/passes.cuh"

#include <math.h>
#include <string.h>

#include "linear/cuda/column_reduce.cuh"
#include "linear/cuda/rank_plan.cuh"
#include "linear/cuda/rank_reduce.cuh"
#include "linear/cuda/run_tables.cuh"
#include "linear/cuda/split.cuh"

namespace peft_ext {

DeviceDropout device_dropout(const Launcher& launcher, const DeviceAdapter& adapter) {
  if (!adapter.seed.has_value()) return DeviceDropout{};
  DeviceDropout dropout;
  dropout.active = true;
  if (on_host(*adapter.seed)) {
    memcpy(dropout.words, adapter.seed->const_data_ptr(), sizeof(dropout.words));
  } else {
    dropout.in_memory = reinterpret_cast<const uint32_t*>(launcher.in<int64_t>(*adapter.seed));
  }
  dropout.threshold = static_cast<uint32_t>(nearbyint(adapter.dropout_p * 65536.0));
  dropout.scale = static_cast<float>(1.0 / (1.0 - adapter.dropout_p));
  return dropout;
}

// --- terms -----------------------------------------------------------------------------------------------------------

namespace {

HeldTerms empty_terms(const Tensor& like, TermsOrder order, int count, int64_t outer, int64_t inner,
                      int64_t matrices = 1) {
  HeldTerms held;
  held.storage = device_empty(like, {matrices, count, outer, inner}, ScalarType::BFloat16);
  held.terms = Terms{nullptr, count, outer, inner, order};
  return held;
}

int expand_terms(ScalarType type) {
  return type == ScalarType::Float ? kExpandLeftTerms<float> : kExpandLeftTerms<bf16>;
}

}  // namespace

HeldTerms left_terms(const Tensor& like, int64_t rows, int64_t padded_rank, ScalarType type) {
  return empty_terms(like, TermsOrder::kLeft, expand_terms(type), round_up(rows, kExpandTile), padded_rank);
}

HeldTerms grouped_left_terms(const Tensor& like, int64_t matrices, int64_t rows, int64_t padded_rank, ScalarType type) {
  return empty_terms(like, TermsOrder::kLeft, expand_terms(type), round_up(rows, kExpandTile), padded_rank, matrices);
}

HeldTerms pass_terms(const Tensor& like, int64_t padded_rank, int64_t rows) {
  return empty_terms(like, TermsOrder::kPass, kMaxTerms, padded_rank, round_up(rows, kRankTile));
}

HeldTerms grouped_A_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t inputs, bool one) {
  return empty_terms(like, TermsOrder::kPass, one ? 1 : kMaxTerms, padded_rank, round_up(inputs, kRankTile), adapters);
}

HeldTerms grouped_B_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t outputs, bool one,
                          ScalarType type) {
  return empty_terms(like, TermsOrder::kRight, one ? 1 : expand_terms(type), round_up(outputs, kExpandTile),
                     padded_rank, adapters);
}

Terms read_terms(const Launcher& launcher, const HeldTerms& held) {
  Terms terms = held.terms;
  terms.data = static_cast<const uint4*>(launcher.in<void>(held.storage));
  return terms;
}

TermsOut write_terms(const Launcher& launcher, const HeldTerms& held) {
  const Terms& terms = held.terms;
  return {static_cast<uint32_t*>(launcher.scratch<void>(held.storage)), terms.count, terms.outer, terms.inner,
          terms.order};
}

HeldTerms Splitter::right_of_pass(const Tensor& matrix, bool transpose, const Tensor* inner_scale) {
  // One term represents a bfloat16 matrix exactly. A kernel for a factor of one term is compiled only for a large
  // matrix D in bfloat16.
  const bool one = type_ == ScalarType::BFloat16 && matrix.scalar_type() == type_ && inner_scale == nullptr;
  return add(TermsOrder::kPass, matrix, transpose, one ? 1 : kMaxTerms, nullptr, inner_scale);
}

HeldTerms Splitter::left_of_pass(const Tensor& matrix, bool transpose) {
  return add(TermsOrder::kPass, matrix, transpose, kMaxTerms);
}

HeldTerms Splitter::right_of_expand(const Tensor& matrix, bool transpose, const Tensor* outer_scale) {
  const bool one = type_ == ScalarType::BFloat16 && matrix.scalar_type() == type_ && outer_scale == nullptr;
  return add(TermsOrder::kRight, matrix, transpose, one ? 1 : expand_terms(type_), outer_scale);
}

HeldTerms Splitter::left_of_expand(const Tensor& matrix, bool transpose) {
  return add(TermsOrder::kLeft, matrix, transpose, expand_terms(type_));
}

HeldTerms Splitter::add(TermsOrder order, const Tensor& matrix, bool transpose, int count, const Tensor* outer_scale,
                        const Tensor* inner_scale) {
  const int64_t outer = matrix.size(transpose ? 1 : 0), inner = matrix.size(transpose ? 0 : 1);
  const bool pass = order == TermsOrder::kPass;
  const HeldTerms held = empty_terms(like_, order, count, pass ? padded_rank(outer) : round_up(outer, kExpandTile),
                                     pass ? round_up(inner, kRankTile) : padded_rank(inner));
  if (count_ == kMaxSplits) run();
  Split& work = splits_.work[count_++];
  work.in = launcher_.in<void>(matrix);
  work.type = dtype_of(matrix.scalar_type());
  work.outer = outer;
  work.inner = inner;
  work.outer_stride = transpose ? 1 : matrix.size(1);
  work.inner_stride = transpose ? matrix.size(1) : 1;
  work.outer_scale = outer_scale == nullptr ? nullptr : launcher_.in<float>(*outer_scale);
  work.inner_scale = inner_scale == nullptr ? nullptr : launcher_.in<float>(*inner_scale);
  work.out = write_terms(launcher_, held);
  blocks_ = std::max(blocks_, ceil_div(held.terms.outer * held.terms.inner / 2, kSplitThreads));
  return held;
}

void Splitter::run() {
  launcher_(split_kernel, {blocks_, count_}, kSplitThreads, splits_);
  count_ = 0;
  blocks_ = 0;
}

RowTable row_table(const Launcher& launcher, const RowTiles& held) {
  return {launcher.in<int32_t>(held.rows), static_cast<const RowTile*>(launcher.in<void>(held.tiles))};
}

RowRuns row_runs(const char* op, const Tensor& ends, int64_t rows) {
  RowRuns held;
  held.experts = ends.numel();
  held.rows = rows;
  STD_TORCH_CHECK(rows + (held.experts + 1) * kTileRows < INT32_MAX - kChunkRows, op, ": x has ", rows, " rows of ",
                  held.experts, " experts, wanted fewer than 2^31 with 64 for each expert");
  held.tile_room = rows / kTileRows + std::min(held.experts + 1, rows);
  held.chunk_room = rows / kChunkRows + std::min(held.experts, rows);
  constexpr int64_t kWords = sizeof(RowRun) / 4;
  held.first_row = device_empty(ends, {held.experts + 2}, ScalarType::Int);
  held.first_tile = device_empty(ends, {held.experts + 2}, ScalarType::Int);
  held.first_chunk = device_empty(ends, {held.experts + 1}, ScalarType::Int);
  held.tiles = device_empty(ends, {held.tile_room, kWords}, ScalarType::Int);
  held.chunks = device_empty(ends, {held.chunk_room, kWords}, ScalarType::Int);
  Launcher launcher(ends);
  launcher(row_runs_kernel, 1, kRunThreads,
           RunTables{launcher.in<int64_t>(ends), held.experts, rows, launcher.scratch<int32_t>(held.first_row),
                     launcher.scratch<int32_t>(held.first_tile), launcher.scratch<int32_t>(held.first_chunk),
                     static_cast<RowRun*>(launcher.scratch<void>(held.tiles)),
                     static_cast<RowRun*>(launcher.scratch<void>(held.chunks)), held.tile_room, held.chunk_room});
  return held;
}

// --- rank passes -----------------------------------------------------------------------------------------------------

PassInput dense_input(const Tensor& matrix, const DeviceAdapter* dropout) {
  return {&matrix, nullptr, matrix.size(0), matrix.size(1), matrix.scalar_type(), dropout, nullptr, nullptr};
}

PassInput weight_input(const DeviceWeight& weight, ScalarType type) {
  return {weight.is_nf4() ? nullptr : &weight.weight,
          weight.is_nf4() ? &weight : nullptr,
          weight.outputs,
          weight.inputs,
          type,
          nullptr,
          nullptr,
          nullptr};
}

PassSums rank_pass(const PassInput& input, const HeldTerms* right, const HeldTerms* left, const PassWants& wants) {
  const int64_t rank = right != nullptr ? right->terms.outer : left->terms.outer;
  // Two passes over D compute P = D F and Q = Dᵀ L if the sums of P and Q together do not fit in registers (more than
  // 32 ranks), or if F and L have different padded ranks.
  if (right != nullptr && left != nullptr && (rank > 32 || left->terms.outer != rank)) {
    PassSums both = rank_pass(input, right, nullptr);
    both.columns = rank_pass(input, nullptr, left).columns;
    return both;
  }
  Launcher launcher(input.tensor());
  RankPass pass;
  pass.rows = input.rows;
  pass.columns = input.columns;
  pass.padded_rank = rank;
  pass.padded_rows = input.runs != nullptr    ? input.runs->padded_rows()
                     : input.tiles != nullptr ? input.tiles->adapted * kRankTile
                                              : round_up(input.rows, kRankTile);
  pass.padded_columns = round_up(input.columns, kRankTile);
  if (input.dense != nullptr) {
    pass.dense = launcher.in<void>(*input.dense);
  } else {
    pass.nf4 = nf4_view(launcher, *input.nf4);
  }
  if (input.dropout != nullptr) pass.dropout = device_dropout(launcher, *input.dropout);
  if (right != nullptr) pass.right = read_terms(launcher, *right);
  if (left != nullptr) pass.left = read_terms(launcher, *left);
  if (input.tiles != nullptr) {
    pass.table = row_table(launcher, *input.tiles);
    pass.right_stride = terms_stride(*right);
  }

  if (input.runs != nullptr) {
    pass.runs =
        static_cast<const RowRun*>(launcher.in<void>(right != nullptr ? input.runs->tiles : input.runs->chunks));
    if (right != nullptr) pass.right_stride = terms_stride(*right);
  }

  RankVariant variant{};
  variant.nf4 = input.nf4 != nullptr;
  variant.whole =
      input.columns % kVector == 0 && aligned(input.tensor(), variant.nf4 ? 4 : 16) && input.columns < kMaxRankColumns;
  variant.work = input.runs != nullptr    ? right != nullptr ? RankWork::kRunRows : RankWork::kRunColumns
                 : right == nullptr       ? RankWork::kColumns
                 : left != nullptr        ? RankWork::kBoth
                 : wants.squares          ? RankWork::kRowsAndSquares
                 : input.tiles != nullptr ? RankWork::kGroupedRows
                                          : RankWork::kRows;
  // With a RowTable, rank_pass_kernel holds the offset of a row of D in 32 bits, in units of 16 bytes.
  if (input.tiles != nullptr)
    variant.whole = variant.whole && input.tensor().numel() / 16 * input.tensor().element_size() < UINT32_MAX;
  const bool drops = pass.dropout.active, keeps = wants.mask && drops && variant.whole;
  variant.mask = keeps ? RankMask::kKept : drops ? RankMask::kDrawn : RankMask::kNone;

  const bool dots = wants.beside != nullptr && variant.work == RankWork::kBoth && variant.whole && !drops &&
                    aligned(*wants.beside, 16);
  if (dots) {
    variant.work = RankWork::kBothAndDots;
    pass.beside = launcher.in<void>(*wants.beside);
  }

  RankPlan plan = plan_rank_pass(variant.work, pass.padded_rows / kRankTile, pass.padded_columns / kRankTile);
  if (variant.work == RankWork::kRunColumns)
    // Each thread block computes Q = Dᵀ L for one chunk of an expert's rows and one tile of columns.
    plan = {0, 1, input.runs->chunk_room, pass.padded_columns / kRankTile};
  pass.row_tiles = plan.row_tiles;
  pass.column_tiles = plan.column_tiles;
  pass.column_chunks = plan.column_chunks;

  PassSums found;
  const Tensor& like = input.tensor();
  if (right != nullptr) {
    found.rows = {device_empty(like, {plan.column_chunks, pass.padded_rows, rank}, ScalarType::Float),
                  plan.column_chunks, pass.padded_rows, input.rows};
    pass.row_sums = launcher.scratch<float>(found.rows.sums);
    if (wants.squares) {
      found.squares = device_empty(like, {plan.column_chunks, pass.padded_rows}, ScalarType::Float);
      pass.squares = launcher.scratch<float>(found.squares);
    }
  }
  if (left != nullptr) {
    found.columns = {device_empty(like, {plan.row_chunks, pass.padded_columns, rank}, ScalarType::Float),
                     plan.row_chunks, pass.padded_columns, input.columns};
    pass.column_sums = launcher.scratch<float>(found.columns.sums);
  }
  if (dots) {
    found.dots = device_empty(like, {plan.row_chunks, pass.padded_columns / 2, 2}, ScalarType::Float);
    pass.dots = launcher.scratch<float>(*found.dots);
  }
  if (keeps) {
    const int64_t tiles = pass.padded_rows / kRankTile * (pass.padded_columns / kRankTile);
    found.kept = device_empty(like, {tiles, kRankThreads}, ScalarType::Int);
    pass.kept = static_cast<uint32_t*>(launcher.scratch<void>(*found.kept));
  }
  with_type(input.type, [&](auto zero) {
    const bool one_dimension = right != nullptr && input.runs == nullptr;
    const Grid grid =
        one_dimension ? Grid(plan.row_chunks * plan.column_chunks) : Grid(plan.row_chunks, plan.column_chunks);
    input.runs != nullptr ? launch_rank_runs<decltype(zero)>(launcher, grid, pass, variant)
                          : launch_rank_pass<decltype(zero)>(launcher, grid, pass, variant);
  });
  return found;
}

static RankReduce reduce_work(const Launcher& launcher, const PartialSums& partial, int64_t rank,
                              const Reduced& wanted) {
  RankReduce work{};
  work.partial = launcher.in<float>(partial.sums);
  work.chunks = partial.chunks;
  work.rows = partial.rows;
  work.padded_rows = partial.padded_rows;
  work.rank = rank;
  work.padded_rank = partial.sums.size(2);
  if (wanted.tiles != nullptr) {
    work.table = row_table(launcher, *wanted.tiles);
    work.table_rows = wanted.tiles->count * kTileRows;
  }
  work.scale = static_cast<float>(wanted.scale);
  work.after = static_cast<float>(wanted.after);
  if (wanted.row_scale != nullptr) work.row_scale = launcher.in<float>(*wanted.row_scale);
  if (wanted.rank_scale != nullptr) work.rank_scale = launcher.in<float>(*wanted.rank_scale);
  if (wanted.plain != nullptr) {
    // In a mixed batch, `plain` is S. The columns of S beyond the largest rank that a sample uses already hold zeros.
    work.plain = wanted.tiles != nullptr ? launcher.out<float>(*wanted.plain) : launcher.scratch<float>(*wanted.plain);
    work.plain_stride = wanted.plain->size(1);
  }
  if (wanted.terms != nullptr) work.terms = write_terms(launcher, *wanted.terms);
  if (wanted.transposed != nullptr) work.transposed = write_terms(launcher, *wanted.transposed);
  if (wanted.out != nullptr) {
    work.out = launcher.scratch<void>(*wanted.out);
    work.type = dtype_of(wanted.out->scalar_type());
  }
  work.row_stride = wanted.row_stride;
  work.rank_stride = wanted.rank_stride;
  return work;
}

void Reducer::add(const PartialSums& partial, int64_t rank, const Reduced& wanted) {
  if (count_ == kMostReduces) run();
  RankReduce& work = reduces_.work[count_++];
  work = reduce_work(launcher_, partial, rank, wanted);
  blocks_ = std::max(
      blocks_, ceil_div(std::max(work.padded_rows, work.table_rows) * work.padded_rank / 2, int64_t{kReduceThreads}));
}

void Reducer::run() {
  launcher_(rank_reduce_kernel, {blocks_, count_}, kReduceThreads, reduces_);
  count_ = 0;
  blocks_ = 0;
}

void reduce(const PartialSums& partial, int64_t rank, const Reduced& wanted) {
  Reducer reducer(partial.sums);
  reducer.add(partial, rank, wanted);
  reducer.run();
}

namespace {

// Returns the arguments that all launches of expand_kernel have: the result and the two factors of the product.
ExpandTerms expand_work(const Launcher& launcher, const Tensor& out, const HeldTerms* left, const HeldTerms* right) {
  ExpandTerms work{};
  work.out = launcher.out<void>(out);
  work.rows = out.size(0);
  work.columns = out.size(1);
  work.tiles = ceil_div(work.rows, kExpandTile);
  if (left != nullptr) {
    work.left = read_terms(launcher, *left);
    work.right = read_terms(launcher, *right);
  }
  return work;
}

}  // namespace

void expand(const Tensor& out, const HeldTerms* left, const HeldTerms* right, const Tensor* before,
            const std::optional<Tensor>& bias, const std::optional<Scaled>& scaled, double bias_scale) {
  Launcher launcher(out);
  ExpandTerms work = expand_work(launcher, out, left, right);
  bool whole = whole_columns(out, work.columns);
  if (before != nullptr) {
    work.before = before->const_data_ptr() == out.const_data_ptr() ? work.out : launcher.in<void>(*before);
    whole = whole && aligned(*before, 16);
  }
  // If `before` or `scaled` is given, the bias is converted to float32, because the instance of expand_kernel for kOnto
  // reads a float32 bias. Otherwise expand_kernel reads the bias in the bias's own dtype.
  const std::optional<Tensor> held_bias = bias.has_value() && (before != nullptr || scaled.has_value())
                                              ? std::optional<Tensor>(as_type(*bias, ScalarType::Float))
                                              : bias;
  if (held_bias.has_value()) {
    work.bias = launcher.in<void>(*held_bias);
    work.bias_type = dtype_of(held_bias->scalar_type());
    work.bias_scale = static_cast<float>(bias_scale);
    whole = whole && aligned(*held_bias, 16) &&
            (before != nullptr || scaled.has_value() || held_bias->scalar_type() == out.scalar_type());
  }
  if (scaled.has_value()) {
    work.z = launcher.in<void>(scaled->z);
    work.scale = launcher.in<float>(scaled->scale);
    whole = whole && aligned(scaled->z, 16) && aligned(scaled->scale, 16);
  }
  with_type(out.scalar_type(), [&](auto zero) { launch_expand<decltype(zero)>(launcher, work, whole); });
}

void expand_grouped(const Tensor& out, const RowTiles& tiles, const HeldTerms& left, const HeldTerms& right,
                    const std::optional<Tensor>& bias) {
  Launcher launcher(out);
  ExpandTerms work = expand_work(launcher, out, &left, &right);
  work.table = row_table(launcher, tiles);
  work.tiles = tiles.count;
  work.right_stride = terms_stride(right);
  if (bias.has_value()) {
    work.bias = launcher.in<void>(*bias);
    work.bias_type = dtype_of(bias->scalar_type());
    work.bias_scale = 1.0f;
  }
  const bool whole = whole_columns(out, work.columns) && (!bias.has_value() || aligned(*bias, 16));
  with_type(out.scalar_type(), [&](auto zero) { launch_expand<decltype(zero)>(launcher, work, whole); });
}

void expand_dropped(const Tensor& out, const HeldTerms& left, const HeldTerms& right, const DeviceAdapter& adapter,
                    const std::optional<Tensor>& kept) {
  if (!adapter.seed.has_value()) return expand(out, &left, &right, nullptr, std::nullopt);
  Launcher launcher(out);
  ExpandTerms work = expand_work(launcher, out, &left, &right);
  const bool whole = whole_columns(out, work.columns);
  if (whole && kept.has_value()) {
    work.kept = static_cast<const uint32_t*>(launcher.in<void>(*kept));
  } else {
    work.dropout = device_dropout(launcher, adapter);
  }
  with_type(out.scalar_type(), [&](auto zero) { launch_expand<decltype(zero)>(launcher, work, whole); });
}

void expand_dropped(const Tensor& out, const std::vector<DroppedProduct>& terms) {
  if (terms.size() == 1) return expand_dropped(out, *terms[0].left, *terms[0].right, *terms[0].adapter, *terms[0].kept);
  bool whole = whole_columns(out, out.size(1)) && terms.size() <= kMostExpandParts;
  for (const DroppedProduct& term : terms)
    whole = whole && (!term.adapter->seed.has_value() || term.kept->has_value()) &&
            term.right->terms.count == terms[0].right->terms.count;
  if (whole) {
    Launcher launcher(out);
    ExpandSum work{};
    work.out = launcher.out<void>(out);
    work.rows = out.size(0);
    work.columns = out.size(1);
    for (const DroppedProduct& term : terms) {
      ExpandPart& part = work.parts[work.count++];
      part.left = read_terms(launcher, *term.left);
      part.right = read_terms(launcher, *term.right);
      if (term.adapter->seed.has_value()) part.kept = static_cast<const uint32_t*>(launcher.in<void>(**term.kept));
    }
    with_type(out.scalar_type(), [&](auto zero) { launch_expand_sum<decltype(zero)>(launcher, work); });
    return;
  }
  expand_dropped(out, *terms[0].left, *terms[0].right, *terms[0].adapter, *terms[0].kept);
  for (size_t i = 1; i < terms.size(); ++i) {
    Launcher launcher(out);
    ExpandTerms work = expand_work(launcher, out, terms[i].left, terms[i].right);
    work.before = work.out;
    work.dropout = device_dropout(launcher, *terms[i].adapter);
    with_type(out.scalar_type(), [&](auto zero) { launch_expand<decltype(zero)>(launcher, work, false); });
  }
}

// --- elementwise -----------------------------------------------------------------------------------------------------

Tensor dropped(const Tensor& x, const DeviceAdapter& adapter, const std::optional<Tensor>& add) {
  const Tensor out = device_empty_like(x);
  Launcher launcher(out);
  Drop work{};
  work.x = launcher.in<void>(x);
  work.add = launcher.in<void>(add);
  work.out = launcher.scratch<void>(out);
  work.numel = x.numel();
  work.whole = aligned(x, 16) && aligned(out, 16) && (!add.has_value() || aligned(*add, 16));
  work.dropout = device_dropout(launcher, adapter);
  with_type(x.scalar_type(), [&](auto zero) {
    launcher(drop_kernel<decltype(zero)>, ceil_div(work.numel, kVector * kColumnThreads), kColumnThreads, work);
  });
  return out;
}

void finish(const Tensor& y, const Tensor& z, const Tensor& scale, const std::optional<Tensor>& bias_before,
            const std::optional<Tensor>& bias_after) {
  Launcher launcher(y);
  Finish work{};
  work.out = launcher.out<void>(y);
  work.z = launcher.out<void>(z);
  work.scale = launcher.in<float>(scale);
  work.bias_before = launcher.in<void>(bias_before);
  work.bias_after = launcher.in<void>(bias_after);
  work.rows = y.size(0);
  work.columns = y.size(1);
  work.whole = whole_columns(y, work.columns) && aligned(z, 16);
  with_type(y.scalar_type(), [&](auto zero) {
    launcher(finish_kernel<decltype(zero)>, {ceil_div(work.rows, kColumnRows), ceil_div(work.columns, kColumnTile)},
             kColumnThreads, work);
  });
}

Tensor scaled_weight(const DeviceWeight& weight, ScalarType type, const Tensor& g) {
  if (weight.is_packed()) return dense_weight(weight, type, &g);
  const Tensor out = device_empty(weight.weight, {weight.outputs, weight.inputs}, type);
  Launcher launcher(out);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    launcher(scale_rows_kernel<T>, {ceil_div(weight.inputs, kColumnThreads * kVector), weight.outputs}, kColumnThreads,
             launcher.in<T>(weight.weight), launcher.in<float>(g), launcher.scratch<T>(out), weight.inputs);
  });
  return out;
}

bool folds_scale(const DeviceWeight& weight, ScalarType type, int64_t tokens) {
  constexpr int64_t kMostRows = 65535;  // CUDA's limit of a grid's y dimension
  if (weight.inputs % kVector != 0 || type == ScalarType::Half) return false;
  if (weight.is_packed()) return !weight.is_nf4() || weight.outputs * weight.inputs < int64_t{1} << 32;
  return tokens > weight.inputs && weight.outputs <= kMostRows && whole_columns(weight.weight, weight.inputs) &&
         weight.weight.is_contiguous();
}

Tensor reduced_columns(const Tensor& partial) {
  const int64_t chunks = partial.size(0), columns = partial.size(1);
  const Tensor out = device_empty(partial, {columns}, ScalarType::Float);
  Launcher launcher(out);
  launcher(column_reduce_kernel, ceil_div(columns, kColumnThreads), kColumnThreads, launcher.in<float>(partial), chunks,
           columns, launcher.scratch<float>(out));
  return out;
}

ColumnPartials column_partials(const Tensor& m, const std::optional<Tensor>& scale, float shift,
                               const std::optional<Tensor>& other) {
  ColumnPartials found;
  const int64_t rows = m.size(0), columns = m.size(1), chunks = ceil_div(rows, kColumnRows);
  Launcher launcher(m);
  ColumnWork work{};
  work.m = launcher.in<void>(m);
  work.other = launcher.in<void>(other);
  work.scale = launcher.in<float>(scale);
  work.shift = shift;
  work.rows = rows;
  work.columns = columns;
  work.whole = whole_columns(m, columns) && (!other.has_value() || aligned(*other, 16));
  if (scale.has_value()) {
    found.scaled = device_empty_like(m);
    work.out = launcher.scratch<void>(found.scaled);
  }
  if (other.has_value()) {
    found.partial = device_empty(m, {chunks, columns}, ScalarType::Float);
    work.sums = launcher.scratch<float>(found.partial);
  }
  with_type(m.scalar_type(), [&](auto zero) {
    launcher(column_pass_kernel<decltype(zero)>, {chunks, ceil_div(columns, kColumnTile)}, kColumnThreads, work);
  });
  return found;
}

}  // namespace peft_ext
