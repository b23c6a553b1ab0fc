// The kernels of format_kernels.h in plain C++, for any CPU.
#include "cpu/simd_scalar.h"
#include "packed/cpu/format_kernels_impl.h"

namespace peft_ext {

const FormatTable kFormatTableScalar = make_table();

}  // namespace peft_ext
