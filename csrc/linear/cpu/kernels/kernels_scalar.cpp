// The low-rank path on any CPU. See kernels.h for the contract.
#include "cpu/simd_scalar.h"
#include "linear/cpu/kernels/kernels_impl.h"

namespace peft_ext {

const PassKernels kPassKernelsScalar = {row_pass,    expand,          drop_elements, few_tokens,
                                        column_pass, dropped_product, dropped_dots};

}  // namespace peft_ext
