// The kernel of cross_entropy.h with NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyNeon = {rows};

}  // namespace peft_ext
#endif
