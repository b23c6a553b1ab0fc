// The rotary kernel of rotary/kernels.h with NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "rotary/kernels_impl.h"

namespace peft_ext {

const RotaryKernels kRotaryKernelsNeon = {rotate};

}  // namespace peft_ext
#endif
