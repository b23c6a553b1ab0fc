// Rotary position embedding on any CPU. See kernels.h for the contract.
#include "cpu/simd_scalar.h"
#include "rotary/kernels_impl.h"

namespace peft_ext {

const RotaryKernels kRotaryKernelsScalar = {rotate};

}  // namespace peft_ext
