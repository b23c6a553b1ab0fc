// Declares the functions that compute one call of the adapted layer, and the low-rank functions that the whole layer
// and lora_residual share. See adapted_linear.cuh for the formula.
#pragma once

#include "linear/cuda/passes.cuh"
#include "nf4/cuda/nf4_few_tokens.cuh"

namespace peft_ext {

struct DeviceSizes {
  int64_t tokens, inputs, outputs, rank, padded;
};

// Returns the sizes of a call: tokens, inputs, outputs, rank and padded rank. Raises an error if the size or device of
// x, lora_A or lora_B does not fit the weight.
DeviceSizes checked_sizes(const char* op, const Tensor& x, const DeviceWeight& weight, const DeviceAdapter& adapter);

// Checks the dtype, the sizes and the device of dY. x: a tensor with the shape, the dtype and the device of the layer's
// input.
void check_grad(const char* op, const Tensor& grad, const Tensor& x, const DeviceSizes& size);

inline Tensor matrix(const std::optional<Tensor>& tensor) { return as_contiguous(*tensor); }

// Returns the arguments with which `reduce` computes S [T, R] from the partial sums of S. Unless `terms` is null,
// `reduce` also writes the bfloat16 terms of S ∘ ρ.
Reduced shrunk_results(const DeviceAdapter& adapter, const Tensor& s, const HeldTerms* terms);

// shrink computes S [T, R] by a rank pass over x and, unless `terms` is null, the bfloat16 terms of S ∘ ρ.
void shrink(const Tensor& x, const DeviceAdapter& adapter, const DeviceSizes& size, const HeldTerms& a, const Tensor& s,
            const HeldTerms* terms);

// shrink_few computes S for few tokens, at most kMaxShrinkTokens, in one launch.
constexpr int64_t kMaxShrinkTokens = 16;
void shrink_few(const Tensor& x, const DeviceAdapter& adapter, const DeviceSizes& size, const Tensor& s);

// Checks the dtype, size and device of a bias, and returns the bias as a contiguous tensor, or nullopt if there is no
// bias.
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& x, int64_t outputs);

// A TokenFactor (lora_B, rank and scaling of the token's adapter) for each token of a mixed batch, and the tensors to
// which these factors point.
struct HeldFactors {
  Tensor table;
  std::vector<Tensor> lora_B;
};

// Returns the device pointer to held.table, as an argument of a kernel that reads the TokenFactors.
inline const TokenFactor* read_factors(const Launcher& launcher, const HeldFactors& held) {
  for (const Tensor& b : held.lora_B) launcher.in<void>(b);
  return static_cast<const TokenFactor*>(launcher.in<void>(held.table));
}

// few_tokens_accept returns whether few_tokens_forward accepts a call. few_tokens_forward computes y, and out.z if
// want_z is true, from S in out.s. factors: the TokenFactors of a mixed batch; null if the batch is not mixed.
bool few_tokens_accept(const DeviceWeight& weight, ScalarType type, int64_t tokens, const DeviceAdapter& adapter);
void few_tokens_forward(const Tensor& x, const DeviceWeight& weight, const std::optional<Tensor>& bias,
                        const DeviceAdapter& adapter, const DeviceSizes& size, bool bias_inside,
                        const DeviceForward& out, const Tensor& y, bool want_z, const HeldFactors* factors = nullptr);

// Computes y = scaling s Bᵀ + bias for few tokens of a mixed batch, with scaling and B of each token's own adapter.
void expand_few(const Tensor& y, const Tensor& s, const HeldFactors& factors, const std::optional<Tensor>& bias);

// The bfloat16 terms (terms.cuh) of P and A, from which the low-rank part of dX, mask ∘ (P A), is computed. P = (g ∘
// dY) (ρB) also contains dropout's factor 1/(1-p), except if drop_base is true. If dX is not wanted, `p` and `a` hold
// no terms.
struct RankGradients {
  HeldTerms p, a;
  HeldTerms p_transposed;  // the terms of Pᵀ, the factor L of the pass for dA; empty in the results of rank_gradients
  std::optional<Tensor> kept;  // bits of the dropout mask that the pass over x drew; nullopt if the pass stored no bits
};

// The operands and the results of a layer, for rank_gradients, grad_B_of and grad_A_results. The objects that a
// DeviceRankCall points to must live until the last of these calls returns.
struct DeviceRankCall {
  Tensor grad;  // dY as a matrix [T, N]
  const DeviceAdapter* adapter;
  DeviceSizes size;
  Tensor s;
  const Tensor* z;      // Z + b₀ as a matrix, for grad_out_scale; or null
  DeviceBackward* out;  // receives grad_A, grad_B, grad_rank_scale and grad_out_scale
};

// Computes P, grad_B and grad_rank_scale of layers, and grad_out_scale as rank_gradients does. x: a tensor on the
// layers' device, of the dtype of the layers' inputs.
std::vector<RankGradients> grad_B_of(const Tensor& x, const std::vector<DeviceRankCall>& calls, bool needs_grad_x);

// Returns the arguments with which `reduce` computes grad_A from the partial sums of Pᵀ x̃, and sets out->grad_A to an
// uninitialized tensor, which `reduce` fills.
Reduced grad_A_results(const DeviceRankCall& call);

// Computes grad_A, grad_B and grad_rank_scale of layers of one input x. If dX is wanted, the function also returns the
// bfloat16 terms from which the low-rank part of dX is computed. If z is given, the padded rank is at most 32, and dY
// and z can be read in vectors of eight, the function also computes grad_out_scale. If siblings_pass can read x, the
// layers of one group of sibling_groups share one pass over x.
std::vector<RankGradients> rank_gradients(const Tensor& x, const Tensor& flat_x,
                                          const std::vector<DeviceRankCall>& calls, bool needs_grad_x);

// The results of a pass that has computed S before adapted_forward: a pass over x for several layers, or
// rank_gated_kernel.
struct DeviceShrunk {
  Tensor s;
  HeldTerms s_terms, b_terms;  // bfloat16 terms of S ∘ ρ and of B
};

}  // namespace peft_ext
