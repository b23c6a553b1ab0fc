// The activation kernels of activations/kernels.h with AVX-512.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// target_avx512.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx512.h"
#include "activations/kernels_impl.h"

namespace peft_ext {

const ActivationKernels kActivationKernelsAvx512 = {gated_rows, gated_gradient};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
