// The cross-entropy kernel of cross_entropy.h, compiled for NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "cross_entropy/cross_entropy_impl.h"

namespace peft_ext {

const CrossEntropyKernels kCrossEntropyNeon = {rows};

}  // namespace peft_ext
#endif
