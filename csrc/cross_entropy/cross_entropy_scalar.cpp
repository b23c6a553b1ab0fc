// Cross entropy of rows on any CPU. See cross_entropy.h for the contract.
#include "cpu/simd_scalar.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyScalar = {rows};

}  // namespace peft_ext
