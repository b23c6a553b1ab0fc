// The activation kernels of activations/kernels.h with AVX2.
#if defined(__x86_64__)
#include "cpu/target_avx2.h"
// target_avx2.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx2.h"
#include "activations/kernels_impl.h"

namespace peft_ext {

const ActivationKernels kActivationKernelsAvx2 = {gated_rows, gated_gradient};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
