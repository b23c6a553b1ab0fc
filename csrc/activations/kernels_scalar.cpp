// The activation kernels of activations/kernels.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "activations/kernels_impl.h"

namespace peft_ext {

const ActivationKernels kActivationKernelsScalar = {gated_rows, gated_gradient};

}  // namespace peft_ext
