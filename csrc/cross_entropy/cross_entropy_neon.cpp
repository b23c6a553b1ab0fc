// Cross entropy of rows with NEON. See cross_entropy.h for the contract.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyNeon = {rows};

}  // namespace peft_ext
#endif
