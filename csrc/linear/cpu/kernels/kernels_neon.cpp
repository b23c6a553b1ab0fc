// The kernels of kernels.h, compiled for NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "linear/cpu/kernels/kernels_impl.h"

namespace peft_ext {

const PassKernels kPassKernelsNeon = {row_pass,    expand,          drop_elements, few_tokens,
                                      column_pass, dropped_product, dropped_dots};

}  // namespace peft_ext
#endif
