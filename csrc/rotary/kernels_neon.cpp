// Rotary position embedding with NEON. See kernels.h for the contract.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "rotary/kernels_impl.h"

namespace peft_ext {

const RotaryKernels kRotaryKernelsNeon = {rotate};

}  // namespace peft_ext
#endif
