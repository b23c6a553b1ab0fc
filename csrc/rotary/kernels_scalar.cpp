// The rotary kernel of rotary/kernels.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "rotary/kernels_impl.h"

namespace peft_ext {

const RotaryKernels kRotaryKernelsScalar = {rotate};

}  // namespace peft_ext
