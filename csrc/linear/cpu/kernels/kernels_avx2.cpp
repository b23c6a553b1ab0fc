// The kernels of kernels.h, compiled for AVX2.
#if defined(__x86_64__)
#include "cpu/target_avx2.h"
// The headers below must be included after the target pragma (cpu/target_<isa>.h).
#include "cpu/simd_avx2.h"
#include "linear/cpu/kernels/kernels_impl.h"

namespace peft_ext {

const PassKernels kPassKernelsAvx2 = {row_pass,    expand,          drop_elements, few_tokens,
                                      column_pass, dropped_product, dropped_dots};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
