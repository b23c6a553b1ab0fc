// One call of the adapted layer as its parts see it, and the low-rank work that the whole layer and the low-rank term
// alone (lora_residual) share. See adapted_linear.cuh for the formula.
#pragma once

#include "linear/cuda/passes.cuh"
#include "nf4/cuda/nf4_few_tokens.cuh"

namespace peft_ext {

struct LinearSizes {
  int64_t tokens, inputs, outputs, rank, padded;
};

// The sizes of a call; an error where x, lora_A or lora_B do not have those of the weight, or lie elsewhere.
LinearSizes checked_sizes(const char* op, const Tensor& x, const DeviceWeight& weight, const DeviceAdapter& adapter);

inline Tensor matrix(const std::optional<Tensor>& tensor) { return as_contiguous(*tensor); }

// S [T, R], and its terms with ρ where they are asked for: [T][R].
void shrink(const Tensor& x, const DeviceAdapter& adapter, const LinearSizes& size, const HeldTerms& a, const Tensor& s,
            const HeldTerms* terms);

// The same S of a few tokens, at most kMaxShrinkTokens, in one launch.
constexpr int64_t kMaxShrinkTokens = 16;
void shrink_few(const Tensor& x, const DeviceAdapter& adapter, const LinearSizes& size, const Tensor& s);

// A bias as kernels take it.
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t outputs);

// A TokenFactor for each token of a mixed batch, and what they point to.
struct HeldFactors {
  Tensor table;
  std::vector<Tensor> lora_B;
};

// For a kernel that reads them.
inline const TokenFactor* read_factors(const Launcher& launcher, const HeldFactors& held) {
  for (const Tensor& b : held.lora_B) launcher.in<void>(b);
  return static_cast<const TokenFactor*>(launcher.in<void>(held.table));
}

// Whether few_tokens_forward takes a call, and all of it but S, which is in `out`: y, and z where it is wanted.
// factors: of a mixed batch.
bool few_tokens_accept(const DeviceWeight& weight, ScalarType type, int64_t tokens, const DeviceAdapter& adapter);
void few_tokens_forward(const Tensor& x, const DeviceWeight& weight, const std::optional<Tensor>& bias,
                        const DeviceAdapter& adapter, const LinearSizes& size, bool bias_inside,
                        const DeviceForward& out, const Tensor& y, bool want_z, const HeldFactors* factors = nullptr);

// y = s Bᵀ + bias of few tokens of a mixed batch, each with its own adapter's ranks of s.
void expand_few(const Tensor& y, const Tensor& s, const HeldFactors& factors, const std::optional<Tensor>& bias);

// Of dX behind the dropout, mask/(1-p) ∘ (P A): the terms of P and A.
struct RankGradients {
  HeldTerms p, a;
  std::optional<Tensor> kept;  // the mask's bits, which the pass over x drew
};

// grad_A, grad_B and grad_rank_scale of flat dY and x, and the terms where dX is wanted; and grad_out_scale, if z is
// given and the pass over dY has room for it.
RankGradients rank_gradients(const Tensor& x, const Tensor& flat_grad, const Tensor& flat_x,
                             const DeviceAdapter& adapter, const LinearSizes& size, const std::optional<Tensor>& s,
                             bool needs_grad_x, const Tensor* z, DeviceBackward* out);

}  // namespace peft_ext
