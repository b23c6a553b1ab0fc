// The kernels of kernels.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "linear/cpu/kernels/kernels_impl.h"

namespace peft_ext {

const PassKernels kPassKernelsScalar = {row_pass,    expand,          drop_elements, few_tokens,
                                        column_pass, dropped_product, dropped_dots};

}  // namespace peft_ext
