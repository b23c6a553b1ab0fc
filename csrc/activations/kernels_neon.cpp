// The activation kernels of activations/kernels.h with NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "activations/kernels_impl.h"

namespace peft_ext {

const ActivationKernels kActivationKernelsNeon = {gated_rows, gated_gradient};

}  // namespace peft_ext
#endif
