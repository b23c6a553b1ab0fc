// Passes over activations and over W on a GPU, as the glue of the operators calls them; the arithmetic is in the .cuh
// files. Temporaries die at once: what uses their memory next is behind them on the stream.
#pragma once

#include <algorithm>

#include "linear/cuda/adapted_linear.cuh"
#include "linear/cuda/expand.cuh"
#include "linear/cuda/rank_pass.cuh"
#include "nf4/cuda/nf4_weight.cuh"

namespace peft_ext {

DeviceDropout device_dropout(const Launcher& launcher, const DeviceAdapter& adapter);

// --- terms

// A matrix in terms, and the memory that it lies in.
struct HeldTerms {
  Tensor storage;
  Terms terms;
};

// Of activations [rows, rank], padded, as `expand` takes its left side; `type` is that of its result.
HeldTerms left_terms(const Tensor& like, int64_t rows, int64_t padded_rank, ScalarType type);

// Of a mixed batch's A or B, F of a rank pass and of `expand`, for each adapter. one: they are bfloat16 over bfloat16.
HeldTerms grouped_A_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t inputs, bool one);
HeldTerms grouped_B_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t outputs, bool one,
                          ScalarType type);
// Of several matrices [rows, rank], each as left_terms.
HeldTerms grouped_left_terms(const Tensor& like, int64_t matrices, int64_t rows, int64_t padded_rank, ScalarType type);

// From a matrix's terms to the next's, in 16 bytes.
inline int64_t terms_stride(const HeldTerms& held) {
  return held.terms.count * held.terms.outer * held.terms.inner / 8;
}

// Of activations' transpose [rank, rows], padded, as a rank pass takes L.
HeldTerms pass_terms(const Tensor& like, int64_t padded_rank, int64_t rows);

// For a kernel that reads them, or writes them.
Terms read_terms(const Launcher& launcher, const HeldTerms& held);
TermsOut write_terms(const Launcher& launcher, const HeldTerms& held);

// The small matrices of a call that become terms, in one launch: add each, then run(). What they are made from must
// live as long. A matrix is contiguous [rows, columns], or `transpose` says that its transpose is meant.
class Splitter {
 public:
  // type: of the large matrices that the terms meet.
  Splitter(const Tensor& like, ScalarType type) : launcher_(like), like_(like), type_(type) {}

  // F [ranks, columns of D] of a rank pass, or L [ranks, rows of D]. inner_scale, of D's side, may be null.
  HeldTerms right_of_pass(const Tensor& matrix, bool transpose, const Tensor* inner_scale = nullptr);
  HeldTerms left_of_pass(const Tensor& matrix, bool transpose);
  // F [columns of the result, ranks] of `expand`, or L [rows, ranks]. outer_scale, of the columns, may be null.
  HeldTerms right_of_expand(const Tensor& matrix, bool transpose, const Tensor* outer_scale = nullptr);
  HeldTerms left_of_expand(const Tensor& matrix, bool transpose);
  void run() const;

 private:
  HeldTerms add(TermsOrder order, const Tensor& matrix, bool transpose, int count, const Tensor* outer_scale = nullptr,
                const Tensor* inner_scale = nullptr);

  Launcher launcher_;
  const Tensor& like_;
  ScalarType type_;
  Splits splits_{};
  int count_ = 0;
  int64_t blocks_ = 0;
};

// --- a mixed batch's rows

// A RowTable, and the memory that it lies in.
struct RowTiles {
  Tensor rows, tiles;
  int64_t adapted = 0;  // tiles with a factor, the first ones
  int64_t count = 0;    // all
};

RowTable row_table(const Launcher& launcher, const RowTiles& held);

// --- a mixture's rows

// RunTables, and the memory that they lie in.
struct RowRuns {
  Tensor first_row, first_tile, first_chunk, tiles, chunks;
  int64_t experts = 0, rows = 0, tile_room = 0, chunk_room = 0;

  int64_t padded_rows() const { return tile_room * kTileRows; }
};

// Of rows [rows, ...] of `like`'s device that end, by expert, at `ends`: int64 [experts].
RowRuns row_runs(const char* op, const Tensor& ends, int64_t rows);

inline const RowRun* read_tiles(const Launcher& launcher, const RowRuns& held) {
  return static_cast<const RowRun*>(launcher.in<void>(held.tiles));
}

// --- rank passes

// Ranks come in tiles of 8, two, four or eight at a time.
inline int64_t padded_rank(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : round_up(rank, 64); }

// D of a pass: a dense matrix, or an NF4 weight in `type`.
struct PassInput {
  const Tensor* dense = nullptr;  // contiguous
  const DeviceWeight* nf4 = nullptr;
  int64_t rows = 0, columns = 0;
  ScalarType type = ScalarType::Float;
  const DeviceAdapter* dropout = nullptr;
  const RowTiles* tiles = nullptr;  // with `right` alone, which then holds a factor after the other
  const RowRuns* runs = nullptr;    // with one of both; `right` then holds a factor for each expert

  const Tensor& tensor() const { return dense != nullptr ? *dense : nf4->weight; }
};

PassInput dense_input(const Tensor& matrix, const DeviceAdapter* dropout = nullptr);
PassInput weight_input(const DeviceWeight& weight, ScalarType type);

struct PartialSums {
  Tensor sums;  // [chunks, padded rows, padded rank]; of runs the chunks are a run's each
  int64_t chunks = 0, padded_rows = 0, rows = 0;
};

struct PassSums {
  PartialSums rows, columns;
  Tensor squares;              // [chunks, padded rows]
  std::optional<Tensor> kept;  // the mask's bits
  std::optional<Tensor> dots;  // [chunks, padded columns]
};

// P = D F where F is given (right: [ranks][columns]), Q = Dᵀ L where L is (left: [ranks][rows]); each in partial sums.
struct PassWants {
  bool squares = false;            // of D's rows, with F alone
  bool mask = false;               // its bits, with L alone, if D is dropped and has a shape that has them
  const Tensor* beside = nullptr;  // E: the dots, with both, if the shape and the ranks are such that they fit the pass
};
PassSums rank_pass(const PassInput& input, const HeldTerms* right, const HeldTerms* left, const PassWants& wants = {});

// Which rank_pass_kernel.
struct RankVariant {
  bool nf4, whole;
  RankWork work;
  RankMask mask;
};

// rank_pass_kernel's launches over a D of one element type, each in a translation unit of its own.
template <typename T>
void launch_rank_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant);

// The same of the passes over each expert's rows.
template <typename T>
void launch_rank_runs(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant);

// What is wanted of partial sums; see RankReduce.
struct Reduced {
  double scale = 1.0;
  const Tensor* row_scale = nullptr;
  const Tensor* rank_scale = nullptr;
  double after = 1.0;
  const Tensor* plain = nullptr;
  const HeldTerms* terms = nullptr;
  const HeldTerms* transposed = nullptr;
  const Tensor* out = nullptr;
  int64_t row_stride = 0, rank_stride = 0;
  const RowTiles* tiles = nullptr;  // of the pass; rank_scale and after are theirs then
};

void reduce(const PartialSums& partial, int64_t rank, const Reduced& wanted);

// P's and Q's in one launch.
void reduce(const PassSums& sums, int64_t rank, const Reduced& rows, const Reduced& columns);

// What expand adds besides: (g - 1) ∘ z.
struct Scaled {
  Tensor z, scale;
};

// out = left rightᵀ + bias of a mixed batch: left in the table's order, right a factor after the other.
void expand_grouped(const Tensor& out, const RowTiles& tiles, const HeldTerms& left, const HeldTerms& right,
                    const std::optional<Tensor>& bias);

// out = before + left rightᵀ + bias_scale bias; each may be none, before may be out, the bias is of any type.
void expand(const Tensor& out, const HeldTerms* left, const HeldTerms* right, const Tensor* before,
            const std::optional<Tensor>& bias, const std::optional<Scaled>& scaled = std::nullopt,
            double bias_scale = 1.0);

// out = left rightᵀ, and where the adapter drops, mask ∘ of it; `kept` are the mask's bits, if they are known.
void expand_dropped(const Tensor& out, const HeldTerms& left, const HeldTerms& right, const DeviceAdapter& adapter,
                    const std::optional<Tensor>& kept);

// One of several such terms; all of it must live as long.
struct DroppedProduct {
  const HeldTerms *left, *right;
  const DeviceAdapter* adapter;
  const std::optional<Tensor>* kept;
};

// out = their sum, each with its own mask: one write of out, where all have vectors of eight and factors of one kind.
void expand_dropped(const Tensor& out, const std::vector<DroppedProduct>& terms);

// One element type's launches of expand_kernel, each in a translation unit of its own. `whole`: vectors of eight.
template <typename T>
void launch_expand(const Launcher& launcher, const ExpandTerms& work, bool whole);
template <typename T>
void launch_expand_sum(const Launcher& launcher, const ExpandSum& work);

// --- elementwise

// mask/(1-p) ∘ x, and what is to be added to it.
Tensor dropped(const Tensor& x, const DeviceAdapter& adapter, const std::optional<Tensor>& add);

// y = g ∘ (z + b₀) + b₁; y may be z.
void finish(const Tensor& y, const Tensor& z, const Tensor& scale, const std::optional<Tensor>& bias_before,
            const std::optional<Tensor>& bias_after);

// g ∘ W [N, K], row n times g[n], in `type`, rounded once.
Tensor scaled_weight(const DeviceWeight& weight, ScalarType type, const Tensor& g);

// Whether that costs less than to scale an activation [tokens, N], always where W is decoded anyway, and no digits: a
// float16 has no small numbers to hold a small scale's.
bool folds_scale(const DeviceWeight& weight, ScalarType type, int64_t tokens);

// The sums of column_pass, added in order.
Tensor reduced_columns(const Tensor& partial);

struct ColumnPartials {
  Tensor scaled, partial;
};
ColumnPartials column_partials(const Tensor& m, const std::optional<Tensor>& scale, float shift,
                               const std::optional<Tensor>& other);

}  // namespace peft_ext
