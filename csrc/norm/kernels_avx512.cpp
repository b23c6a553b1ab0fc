// The norm kernels of norm/kernels.h with AVX-512.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// target_avx512.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx512.h"
#include "norm/kernels_impl.h"

namespace peft_ext {

const NormKernels kNormKernelsAvx512 = {norm_rows, norm_gradient};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
