// Declares the low-rank terms of a batch in which each token has one of several adapters or none:
//
//   S_t = x_t A_gᵀ [R_g]      Z_t = x_t Wᵀ + s_g S_t B_gᵀ      for every token t of adapter g
//
// A_g, B_g, R_g and s_g are lora_A, lora_B, the rank and the scaling of adapter g. W is the frozen weight.
//
// A segment is a run of tokens that all have the same adapter or all have none. For few tokens, the matrices of an
// adapter are read as they are stored; otherwise packed() (packing.h) converts them once per call. The tokens of a
// mixed batch are not copied or reordered. The tile kernels compute, for a strip of 16 tokens, the term of each adapter
// that one of the strip's tokens has; the other kernels compute for a token only the term of the token's adapter.
#pragma once

#include <vector>

#include "linear/cpu/passes.h"
#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {

struct Segment {
  int64_t begin, end;  // first token of the segment, and the token after its last token
  int64_t group;       // index of the tokens' adapter, or -1 for none
  int64_t tokens() const { return end - begin; }
};

struct Groups {
  std::vector<Tensor> lora_A, lora_B;  // lora_A[g] is [R_g, K], lora_B[g] is [N, R_g]; both are contiguous
  std::vector<float> scaling;
  std::vector<Segment> segments;  // segments of all tokens, in order
  int64_t rank = 0;               // largest rank of the adapters

  int64_t rank_of(const Segment& segment) const { return lora_A[static_cast<size_t>(segment.group)].size(0); }
};

// Checks the adapters of a mixed batch, and returns the adapters and the segments. adapters: the index of each sample's
// adapter, or -1 for none. tokens: number of tokens of the batch; all samples have equally many.
Groups make_groups(const char* op, const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                   const std::vector<double>& scaling, const std::vector<int64_t>& adapters, int64_t tokens, int64_t in,
                   int64_t out);

// S of every segment: a float32 matrix [tokens, stride] in `storage`, from the segment's offset on. A segment's stride
// is the rank of the segment's adapter, or 0 if the segment has no adapter.
struct GroupedS {
  Tensor storage;
  std::vector<int64_t> offsets, strides;

  float* of(size_t segment) const { return static_cast<float*>(storage.mutable_data_ptr()) + offsets[segment]; }
};

// Computes S from x [T, K], and also writes S to s [T, groups.rank], with zeros for tokens without an adapter, and
// beyond the rank of a token's adapter.
GroupedS grouped_shrink(const char* op, const Groups& groups, const Tensor& x, const Tensor& s);

// Adds the low-rank terms of few tokens x [T, in] float32 to y [T, out] float32. grouped_few_tokens also writes S to s
// [T, groups.rank], as grouped_shrink does.
void grouped_few_tokens(const char* op, const Groups& groups, const float* x, int64_t in, float* y, int64_t out,
                        float* s);

// Computes Y (and Z, if wanted) as `finish` describes (see Expand in kernels.h) for all tokens, each with the low-rank
// term of the token's own adapter.
void grouped_expand(const char* op, const Groups& groups, const GroupedS& s, const Expand& finish);

// The low-rank terms of a mixed batch as arguments of the tile kernels, and the memory to which the terms refer.
struct GroupedTerms {
  std::vector<TileTerm> terms;
  std::vector<int64_t> first;
  std::vector<Tensor> held;
};
GroupedTerms grouped_terms(const char* op, const Groups& groups, const GroupedS& s, int64_t tokens, int64_t out);

}  // namespace peft_ext
