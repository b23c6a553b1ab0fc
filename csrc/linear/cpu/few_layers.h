// Declares the forward of adapted layers for few tokens, whose formula is in adapted_linear.h. W (its codes, if W is
// packed), A and B are read in the order in which they are stored, and W is not copied or decoded into panels.
#pragma once

#include <vector>

#include "cpu/stages.h"
#include "linear/cpu/adapted_linear.h"
#include "linear/cpu/call.h"
#include "packed/cpu/skinny.h"

namespace peft_ext {

// Number of bytes of which the address of each block in a call's memory is a multiple.
constexpr int64_t kFewAlignment = 64;

// Returns whether FewLayers computes a layer: dropout does not act on the base, W is contiguous or skinny_accepts
// accepts the packed W, and there are few tokens.
bool few_tokens_accept(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Adapter& adapter);

// Adapted layers with the same input x of few tokens. Only the stages read elements of x, of a weight or of an
// adapter, so that a later call may use this object after their values have changed in place.
class FewLayers {
 public:
  // Returns the layers [begin, end), which must outlive the result, or nullopt if there is no token or
  // few_tokens_accept does not accept one of them. Raises an error if the sizes or dtypes of a layer do not fit x.
  static std::optional<FewLayers> of(const char* op, const Layer* begin, const Layer* end, ScalarType type,
                                     int64_t tokens, int64_t columns);

  // Where `run` writes the results of a layer: Y [T, N] of x's dtype; S [T, R] in float32, or null if the caller needs
  // no S; Z of x's dtype, or null. A layer without a low-rank term has no S.
  struct Results {
    void* y;
    float* s;
    void* z;
  };

  // type: the dtype of x [tokens, columns].
  FewLayers(const char* op, ScalarType type, int64_t tokens, int64_t columns);

  // Adds a layer that few_tokens_accept accepts. If bias_inside is true, `bias` is b₀, otherwise b₁. The weight, the
  // adapter and `op` must outlive this object. If lora_A, lora_B, rank_scale, bias or scale is not contiguous,
  // this object holds a copy of its values.
  void add(const FrozenWeight& weight, const Adapter& adapter, const LinearSizes& size,
           const std::optional<Tensor>& bias, bool bias_inside, const std::optional<Tensor>& scale);

  // The kernels' arguments of one layer in a call.
  struct Run {
    const FewTokensProduct* base = nullptr;
    int64_t tokens = 0;
    const void* x = nullptr;  // x as base->multiply reads it
    float* before = nullptr;  // the base product [T, N]
    float* s = nullptr;       // [T, R]
    float* left = nullptr;    // S times ρ [T, R]
    float scaling = 1.0f;
    const float* rank_scale = nullptr;
    FewTokens shrink{}, expand{};  // S = x Aᵀ and before += left Bᵀ; no rows without lora_A
    Expand finish{};

    void shrink_rows(const PassKernels& isa, int64_t begin, int64_t end) const;
    void multiply(int64_t begin, int64_t end) const { base->multiply(x, before, begin, end); }
    void finish_rows(const PassKernels& isa, int64_t begin, int64_t end) const;
  };

  // Adds to `stages` the stages that compute the layers for a contiguous x. x is read when the stages run, so that an
  // earlier stage may write it. The first stage prepares x, and the second computes S of all adapters except those of a
  // mixed batch. In the third, one thread computes for a row of W the base product, the low-rank term and the final
  // pass (Expand in kernels.h). For a mixed batch, and for a weight whose product is not computed row by row, the
  // low-rank term and the final pass come after that. results: one for each layer, in the order of `add`. room: bytes()
  // bytes at a multiple of kFewAlignment. The room, `runs` and this object must live, and results of a call must not be
  // used, until the stages have run.
  void add_to(Stages* stages, const void* x, const std::vector<Results>& results, char* room,
              std::vector<Run>* runs) const;

  // Computes the layers for a contiguous x, in scratch of the calling thread.
  void run(const void* x, const std::vector<Results>& results) const;

  int64_t bytes() const { return bytes_; }

 private:
  struct Member {
    const Adapter* adapter;
    LinearSizes size;
    FewTokensProduct base;
    std::optional<Tensor> lora_A, lora_B, rank_scale, bias, scale;  // contiguous
    bool bias_inside;

    // Whether the thread that computes rows of the base product also computes the final pass of these rows.
    bool finishes_rows() const { return adapter->groups == nullptr && base.by_rows; }
  };

  // Adds `bytes` bytes to the room of a call.
  void reserve(int64_t bytes);
  // Reads x and the vectors of a layer, and sets `run`. wide: x in float32, or null if no layer reads it.
  void prepare(const Member& member, const void* x, const float* wide, const Results& results, char** room,
               Run* run) const;

  const char* op_;
  ScalarType type_;
  DType dtype_;
  int64_t tokens_, columns_;
  bool widens_ = false;  // whether a layer reads x in float32
  std::vector<Member> members_;
  int64_t bytes_ = 0;
};

}  // namespace peft_ext
