// The rotary kernel of rotary/kernels.h with AVX-512.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// target_avx512.h selects the instruction set for the code of the headers below, and must be included before them.
#include "cpu/simd_avx512.h"
#include "rotary/kernels_impl.h"

namespace peft_ext {

const RotaryKernels kRotaryKernelsAvx512 = {rotate};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
