// Several low-rank adapters in one batch, of which each token has one or none:
//
//   S_t = x_t A_gᵀ [R_g]      Z_t = x_t Wᵀ + s_g S_t B_gᵀ      for every token t of adapter g
//
// A segment is a run of tokens of one adapter. Its adapter's matrices are read as they lie (few tokens) or packed once
// a call; no token is moved, and a token costs its own adapter's rank.
#pragma once

#include <vector>

#include "linear/cpu/passes.h"
#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {

struct Segment {
  int64_t begin, end;  // tokens
  int64_t group;       // -1: no adapter
  int64_t tokens() const { return end - begin; }
};

struct Groups {
  std::vector<Tensor> lora_A, lora_B;  // [R_g, K], [N, R_g], contiguous
  std::vector<float> scaling;
  std::vector<Segment> segments;  // all tokens, in order
  int64_t rank = 0;               // the largest

  int64_t rank_of(const Segment& segment) const { return lora_A[static_cast<size_t>(segment.group)].size(0); }
};

// Checked. adapters: of each sample, `tokens` of them in all in samples of one length; -1: none.
Groups make_groups(const char* op, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                   const std::vector<double>& scaling, const std::vector<int64_t>& adapters, int64_t tokens, int64_t in,
                   int64_t out);

// S of every segment: [tokens, stride] float32 at data + offset, its columns beyond the rank zeros.
struct GroupedS {
  Tensor storage;
  std::vector<int64_t> offsets, strides;

  float* of(size_t segment) const { return static_cast<float*>(storage.mutable_data_ptr()) + offsets[segment]; }
};

// From x [T, K], and into s [T, groups.rank] as well, zeros where a token has none.
GroupedS grouped_shrink(const char* op, const Groups& groups, const Tensor& x, const Tensor& s);

// y [T, N] float32 += the low-rank terms; x [T, K] float32. A and B are read as they lie. Fills s as grouped_shrink.
void grouped_few_tokens(const char* op, const Groups& groups, const Tensor& x, const Tensor& y, const Tensor& s);

// `finish` on all tokens, each with its own adapter's term.
void grouped_expand(const char* op, const Groups& groups, const GroupedS& s, const Expand& finish);

// The terms as the tile kernels take them, and what they point to.
struct GroupedTerms {
  std::vector<TileTerm> terms;
  std::vector<int64_t> first;
  std::vector<Tensor> held;
};
GroupedTerms grouped_terms(const char* op, const Groups& groups, const GroupedS& s, int64_t tokens, int64_t out);

}  // namespace peft_ext
