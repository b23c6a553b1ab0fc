// Declares host functions that launch passes over activations and over W. The kernels are in rank_pass.cuh, expand.cuh
// and columns.cuh. A temporary tensor may be freed right after a launch: later work that reuses the tensor's memory
// runs on the same stream, after the launched kernel.
#pragma once

#include <algorithm>

#include "linear/cuda/adapted_linear.cuh"
#include "linear/cuda/expand.cuh"
#include "linear/cuda/rank_pass.cuh"
#include "linear/cuda/rank_reduction.cuh"
#include "nf4/cuda/nf4_weight.cuh"

namespace peft_ext {

DeviceDropout device_dropout(const Launcher& launcher, const DeviceAdapter& adapter);

// --- terms -----------------------------------------------------------------------------------------------------------

// A small matrix as bfloat16 terms (terms.cuh), and the tensor that holds the terms.
struct HeldTerms {
  Tensor storage;
  Terms terms;
};

// Allocates padded bfloat16 terms for activations [rows, rank], which are the left operand of `expand`. `type`: dtype
// of expand's result, which decides how many terms are made.
HeldTerms left_terms(const Tensor& like, int64_t rows, int64_t padded_rank, ScalarType type);

// grouped_A_terms allocates the bfloat16 terms of each adapter's A in a mixed batch, as factors of a rank pass.
// grouped_B_terms allocates the terms of each adapter's B, as factors of `expand`. If `one` is true, a matrix gets only
// one term, which represents a bfloat16 matrix exactly.
HeldTerms grouped_A_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t inputs, bool one);
HeldTerms grouped_B_terms(const Tensor& like, int64_t adapters, int64_t padded_rank, int64_t outputs, bool one,
                          ScalarType type);
// Allocates bfloat16 terms for several matrices [rows, rank], for each matrix as left_terms does.
HeldTerms grouped_left_terms(const Tensor& like, int64_t matrices, int64_t rows, int64_t padded_rank, ScalarType type);

// Returns, for the terms of several matrices, the distance from one matrix's terms to the next matrix's terms, in units
// of 16 bytes.
inline int64_t terms_stride(const HeldTerms& held) {
  return held.terms.count * held.terms.outer * held.terms.inner / 8;
}

// Allocates padded bfloat16 terms for a transposed matrix of activations [rank, rows], which is the operand L of a rank
// pass.
HeldTerms pass_terms(const Tensor& like, int64_t padded_rank, int64_t rows);

// read_terms returns the argument of a kernel that reads the terms. write_terms returns the argument of a kernel that
// writes the terms.
Terms read_terms(const Launcher& launcher, const HeldTerms& held);
TermsOut write_terms(const Launcher& launcher, const HeldTerms& held);

// Splits all small matrices of a call into bfloat16 terms, in one launch for every kMaxSplits matrices. The caller adds
// each matrix and then calls run(). The caller must keep the matrices alive until run() returns. A matrix is contiguous
// [rows, columns]; if `transpose` is true, the transposed matrix is split.
class Splitter {
 public:
  // type: dtype of the call's large matrices, which decides how many terms are made.
  Splitter(const Tensor& like, ScalarType type) : launcher_(like), like_(like), type_(type) {}

  // right_of_pass adds the factor F [ranks, columns of D] of a rank pass over a matrix D, and left_of_pass adds the
  // factor L [ranks, rows of D]. inner_scale: factors by which F is multiplied along the columns of D, or null.
  HeldTerms right_of_pass(const Tensor& matrix, bool transpose, const Tensor* inner_scale = nullptr);
  HeldTerms left_of_pass(const Tensor& matrix, bool transpose);
  // right_of_expand adds the factor F [columns of the result, ranks] of `expand`, and left_of_expand adds the factor L
  // [rows, ranks]. outer_scale: factors by which the columns of the result are multiplied, or null.
  HeldTerms right_of_expand(const Tensor& matrix, bool transpose, const Tensor* outer_scale = nullptr);
  HeldTerms left_of_expand(const Tensor& matrix, bool transpose);
  void run();

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

// --- rows of a mixed batch -------------------------------------------------------------------------------------------

// The tensors that hold a RowTable (row_tiles.cuh), and the numbers of the table's tiles.
struct RowTiles {
  Tensor rows, tiles;
  int64_t adapted = 0;  // number of tiles whose tokens have an adapter; these tiles come first
  int64_t count = 0;    // number of all tiles, with and without an adapter
};

RowTable row_table(const Launcher& launcher, const RowTiles& held);

// --- rows of a mixture of experts ------------------------------------------------------------------------------------

// The tensors that hold the tables of RunTables (run_tables.cuh), and the sizes of the tables.
struct RowRuns {
  Tensor first_row, first_tile, first_chunk, tiles, chunks;
  int64_t experts = 0, rows = 0, tile_room = 0, chunk_room = 0;

  int64_t padded_rows() const { return tile_room * kTileRows; }
};

// Makes the tables of row_runs.cuh for a matrix with `rows` rows, on the device of `ends`. ends: int64 [experts], the
// end of each expert's rows.
RowRuns row_runs(const char* op, const Tensor& ends, int64_t rows);

inline const RowRun* read_tiles(const Launcher& launcher, const RowRuns& held) {
  return static_cast<const RowRun*>(launcher.in<void>(held.tiles));
}

// --- rank passes -----------------------------------------------------------------------------------------------------

// Returns the rank, padded to 16, 32 or a multiple of 64. A launch of rank_pass_kernel computes two, four, eight or
// sixteen tiles of 8 ranks.
inline int64_t padded_rank(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : round_up(rank, 64); }

// The large matrix D of a rank pass (rank_pass.cuh defines D, E, F, L, P and Q): a dense matrix, or an NF4 weight that
// the pass decodes to `type`.
struct PassInput {
  const Tensor* dense = nullptr;  // D as a contiguous matrix; null for an NF4 weight
  const DeviceWeight* nf4 = nullptr;
  int64_t rows = 0, columns = 0;
  ScalarType type = ScalarType::Float;
  const DeviceAdapter* dropout = nullptr;
  // The tiles of a mixed batch's rows, or null. `tiles` may be given only if the pass has `right`, which then holds one
  // factor for each adapter, and no `left`.
  const RowTiles* tiles = nullptr;
  // The runs of rows of a mixture's experts, or null. `runs` may be given only if the pass has either `right`, with one
  // factor for each expert, or `left`.
  const RowRuns* runs = nullptr;

  const Tensor& tensor() const { return dense != nullptr ? *dense : nf4->weight; }
};

PassInput dense_input(const Tensor& matrix, const DeviceAdapter* dropout = nullptr);
PassInput weight_input(const DeviceWeight& weight, ScalarType type);

struct PartialSums {
  // Partial sums [chunks, padded rows, padded rank] of a product. For Q in a pass over experts' rows, a chunk sums over
  // the rows of one RowRun.
  Tensor sums;
  int64_t chunks = 0, padded_rows = 0, rows = 0;
};

struct PassSums {
  PartialSums rows, columns;
  Tensor squares;              // partial sums of the squares of D's rows, [chunks, padded rows]
  std::optional<Tensor> kept;  // bits of the dropout mask, if the pass has stored the bits
  // Partial sums of D ∘ E, [chunks, padded columns / 2, 2]: a reduction adds them as a product with two ranks.
  std::optional<Tensor> dots;
};

// Selects the results that a rank pass over a large matrix D (x, dY or W) computes in addition to the products P and Q.
// rank_pass computes P = D F if the argument `right`, the terms of F as [ranks][columns], is not null, and Q = Dᵀ L if
// the argument `left`, the terms of L as [ranks][rows], is not null. rank_pass returns P and Q as partial sums.
struct PassWants {
  bool squares = false;  // whether to sum the squares of D's rows; only if F is given and L is not
  // Whether to store the bits of the dropout mask. `mask` may be true only if F is not given. The bits are stored only
  // if there is dropout and kWhole (rank_pass.cuh) is true for D.
  bool mask = false;
  // E, a matrix of D's shape, for the sums of D ∘ E over the rows; or null. The sums are computed only if F and L are
  // given, there are up to 32 ranks and no dropout, kWhole (rank_pass.cuh) is true for D, and E is aligned to 16 bytes.
  const Tensor* beside = nullptr;
};
PassSums rank_pass(const PassInput& input, const HeldTerms* right, const HeldTerms* left, const PassWants& wants = {});

// Parameters that select an instance of rank_pass_kernel.
struct RankVariant {
  bool nf4, whole;
  RankWork work;
  RankMask mask;
};

// Launches rank_pass_kernel for a matrix D of element type T. Each element type T has its own translation unit,
// rank_pass_<type>_cuda.cpp.
template <typename T>
void launch_rank_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant);

// Launches rank_pass_kernel for a pass over the rows of each expert of a mixture.
template <typename T>
void launch_rank_runs(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant);

// The results that `reduce` computes from partial sums. The fields of Reduced have the same meaning as those of
// RankReduce (rank_reduction.cuh).
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
  // Table of a mixed batch's rows, or null; with a table, a tile's own scaling is used in place of `after`.
  const RowTiles* tiles = nullptr;
};

void reduce(const PartialSums& partial, int64_t rank, const Reduced& wanted);

// Computes the results of several partial sums, in one launch for every kMostReduces partial sums. The partial sums and
// the results must live until run() returns.
class Reducer {
 public:
  explicit Reducer(const Tensor& like) : launcher_(like) {}
  void add(const PartialSums& partial, int64_t rank, const Reduced& wanted);
  void run();

 private:
  Launcher launcher_;
  RankReduces reduces_{};
  int count_ = 0;
  int64_t blocks_ = 0;
};

// --- rank passes of several layers of one input ----------------------------------------------------------------------

// One of the layers of siblings_pass. The objects that a SiblingTerm points to must live until siblings_pass returns.
struct SiblingTerm {
  const HeldTerms* factor;  // terms of A [ranks][columns of x], or of Pᵀ [ranks][rows of x]
  const DeviceAdapter* adapter;
};

// Returns whether siblings_pass can read x, which must have a 16-bit dtype, be readable in vectors of eight, and have
// fewer than kMaxRankColumns columns.
bool siblings_read(const Tensor& x);

// Divides layers into groups, each of which one siblings_pass can compute. kinds: a number for each layer. The layers
// of a group have the same number, whose lower 32 bits are the padded rank. In `kinds`, the number of a layer that
// needs no pass over x is -1. A layer with more than 32 ranks has a group of its own; a group has at most six layers,
// or three of padded rank 32.
std::vector<std::vector<size_t>> sibling_groups(const std::vector<int64_t>& kinds);

struct SiblingSums {
  std::vector<PartialSums> sums;
  std::vector<std::optional<Tensor>> kept;  // bits of each layer's dropout mask
};

// Computes the partial sums of x̃_i A_iᵀ for each layer i, or of x̃_iᵀ P_i if `columns` is true, in one pass over x.
// All layers must have the same padded rank, and the factors of all layers must have equally many bfloat16 terms.
// masks: whether to store the bits of the layers' dropout masks, which is allowed only if `columns` is true.
SiblingSums siblings_pass(const Tensor& x, const std::vector<SiblingTerm>& layers, bool columns, bool masks);

struct SiblingsPass;

// Parameters that select an instance of rank_siblings_kernel. launch_siblings launches the instance for element type T;
// each element type has its own translation unit.
struct SiblingVariant {
  int64_t ranks, terms;
  bool columns, dropped;
};
template <typename T>
void launch_siblings(const Launcher& launcher, const Grid& grid, int warps, const SiblingsPass& pass,
                     const SiblingVariant& variant);

// --- products with few ranks added to a matrix -----------------------------------------------------------------------

// An additional term of `expand`: (g - 1) ∘ z, where g is `scale`.
struct Scaled {
  Tensor z, scale;
};

// Computes out = s S Bᵀ + bias for a mixed batch, with the scaling s and the B of each token's own adapter; a token
// without an adapter gets only the bias. `left` has the terms of s S, whose rows are in the order of the RowTable in
// `tiles`; `right` has the terms of each adapter's B.
void expand_grouped(const Tensor& out, const RowTiles& tiles, const HeldTerms& left, const HeldTerms& right,
                    const std::optional<Tensor>& bias);

// Computes out = before + left rightᵀ + bias_scale bias + (g - 1) ∘ z, where g and z are the fields of `scaled`. Each
// of the four terms of expand's sum may be absent. `before` may be `out` itself.
void expand(const Tensor& out, const HeldTerms* left, const HeldTerms* right, const Tensor* before,
            const std::optional<Tensor>& bias, const std::optional<Scaled>& scaled = std::nullopt,
            double bias_scale = 1.0);

// Computes out = mask ∘ (left rightᵀ), or left rightᵀ if the adapter has no dropout. kept: the bits of the mask, if a
// rank pass has stored these bits; if nullopt, or if `out` cannot be written in vectors of eight, the mask is drawn
// again.
void expand_dropped(const Tensor& out, const HeldTerms& left, const HeldTerms& right, const DeviceAdapter& adapter,
                    const std::optional<Tensor>& kept);

// One product left rightᵀ with its own dropout mask. The objects that a DroppedProduct points to must live until
// expand_dropped returns.
struct DroppedProduct {
  const HeldTerms *left, *right;
  const DeviceAdapter* adapter;
  const std::optional<Tensor>* kept;
};

// Computes out, the sum of several products, each with its own dropout mask. `out` is written only once if there are at
// most kMostExpandParts products, if `out` can be written in vectors of eight, if the bits of all masks are stored, and
// if all factors have equally many terms. If `out` cannot be written only once, a launch for each product adds the
// product to `out`.
void expand_dropped(const Tensor& out, const std::vector<DroppedProduct>& terms);

// launch_expand launches expand_kernel, and launch_expand_sum launches expand_sum_kernel, for one element type. Each
// element type has its own translation unit, expand_<type>_cuda.cpp. `whole`: whether the kernel may load and store
// vectors of eight elements.
template <typename T>
void launch_expand(const Launcher& launcher, const ExpandTerms& work, bool whole);
template <typename T>
void launch_expand_sum(const Launcher& launcher, const ExpandSum& work);

// --- elementwise -----------------------------------------------------------------------------------------------------

// Returns mask/(1-p) ∘ x, plus `add` if `add` is given.
Tensor dropped(const Tensor& x, const DeviceAdapter& adapter, const std::optional<Tensor>& add);

// Computes y = g ∘ (z + b₀) + b₁. y may be the same tensor as z.
void finish(const Tensor& y, const Tensor& z, const Tensor& scale, const std::optional<Tensor>& bias_before,
            const std::optional<Tensor>& bias_after);

// Returns g ∘ W [N, K], row n times g[n], in `type`, rounded once.
Tensor scaled_weight(const DeviceWeight& weight, ScalarType type, const Tensor& g);

// Returns whether scaling W by g is allowed and takes less work than scaling an activation [tokens, N]. A packed weight
// is decoded anyway, so that scaling the weight costs nothing. folds_scale returns false for float16, because the
// product of a small scale and a weight would lose digits.
bool folds_scale(const DeviceWeight& weight, ScalarType type, int64_t tokens);

// Adds the partial sums of column_pass in order, and returns the sums.
Tensor reduced_columns(const Tensor& partial);

struct ColumnPartials {
  Tensor scaled, partial;
};
ColumnPartials column_partials(const Tensor& m, const std::optional<Tensor>& scale, float shift,
                               const std::optional<Tensor>& other);

}  // namespace peft_ext
