// The dropout operator on the CPU: y = mask ∘ x / (1 - p). The backward applies the same formula to dY. The draw of an
// element depends only on the seed and the element's index, so that the bits are equal for every number of threads.
#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

Tensor dropout_cpu(Tensor x, double dropout_p, Tensor seed) {
  constexpr const char* kOp = "dropout";
  return dropped_elements(kOp, as_contiguous(x), make_dropout(kOp, dropout_p, seed));
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) { m.impl("dropout", PEFT_EXT_CPU_BOX(&peft_ext::dropout_cpu)); }
