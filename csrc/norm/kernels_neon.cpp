// The norm kernels of norm/kernels.h with NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "norm/kernels_impl.h"

namespace peft_ext {

const NormKernels kNormKernelsNeon = {norm_rows, norm_gradient};

}  // namespace peft_ext
#endif
