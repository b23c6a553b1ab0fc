// The weights and adapters of a mixture of experts as arguments of host functions.
#pragma once

#include "experts/cuda/stacks.cuh"
#include "experts/cuda/stack_view.cuh"
#include "linear/cuda/passes.cuh"

namespace peft_ext {

inline bool multiple(int64_t size, int64_t of) { return size % of == 0; }

// The weights of all experts: dense [E, N, K] with any strides, or NF4, where each expert is packed separately and the
// experts follow in order.
struct DeviceStack {
  DeviceWeight all;  // the tensors hold the weights of all experts; the sizes are those of one expert's weight
  int64_t experts = 0;
};

// Returns the checked weights of all experts. Weights in another packed format than NF4 are decoded to a dense stack in
// `type` for the duration of the call: 1.06 GB for 32 experts of [5760, 2880] in bfloat16.
DeviceStack checked_stack(const char* op, const Tensor& weight, const DeviceParts& parts, int64_t layout,
                          const std::vector<int64_t>& shape, ScalarType type);

// Returns the kernels' view of the weights. With `transpose`, a column of the view is an output of the layer; otherwise
// a column is an input.
StackView stack_view(const Launcher& launcher, const DeviceStack& stack, bool transpose);

struct StackAdapters {
  std::optional<Tensor> lora_A, lora_B;  // lora_A [E, R, K] and lora_B [E, N, R], with any strides
  std::optional<Tensor> out_scale;       // DoRA's g [E, N] float32
  DeviceAdapter scale;                   // holds scaling, dropout_p and seed; all other fields are unused
  int64_t rank = 0, padded = 0;

  double divided() const { return scale.seed.has_value() ? 1.0 / (1.0 - scale.dropout_p) : 1.0; }
};

StackAdapters checked_adapters(const char* op, const DeviceStack& stack, const std::optional<Tensor>& lora_A,
                               const std::optional<Tensor>& lora_B, const std::optional<Tensor>& out_scale,
                               double scaling, double dropout_p, const std::optional<Tensor>& seed);

// Splits the small matrices of all experts, stacks [E, ...], into bfloat16 terms, in one launch. `ends` holds the ends
// of the experts' rows of x; experts without rows get no terms.
class StackSplitter {
 public:
  StackSplitter(const Tensor& like, ScalarType type, int64_t experts, const Tensor* ends)
      : launcher_(like), like_(like), type_(type), experts_(experts) {
    if (ends != nullptr) splits_.ends = launcher_.in<int64_t>(*ends);
  }

  // right_of_pass and right_of_product return the bfloat16 terms of each expert's factor F: for a rank pass F is
  // [ranks, columns of D], and for the product F is [columns of the result, ranks]. F is the expert's matrix in
  // `stack`, or with `transpose` the transpose of the matrix. inner_scale [E, columns of D] multiplies the columns of F
  // before the split; a null pointer stands for ones.
  HeldTerms right_of_pass(const Tensor& stack, bool transpose, int64_t padded, const Tensor* inner_scale = nullptr);
  HeldTerms right_of_product(const Tensor& stack, bool transpose, int64_t padded);
  // left_of_product returns the bfloat16 terms of each expert's matrix [rows, ranks] in `stack`, as the left factor L
  // of a low-rank product.
  HeldTerms left_of_product(const Tensor& stack, int64_t padded);
  void run() const;

 private:
  HeldTerms add(const HeldTerms& held, const Tensor& stack, bool transpose, const Tensor* inner_scale = nullptr);

  Launcher launcher_;
  const Tensor& like_;
  ScalarType type_;
  int64_t experts_;
  StackSplits splits_{};
  int64_t count_ = 0, blocks_ = 0;
};

}  // namespace peft_ext
