// The norm kernels of norm/kernels.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "norm/kernels_impl.h"

namespace peft_ext {

const NormKernels kNormKernelsScalar = {norm_rows, norm_gradient};

}  // namespace peft_ext
