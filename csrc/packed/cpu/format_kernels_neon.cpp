// The kernels of format_kernels.h with NEON.
#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#include "packed/cpu/format_kernels_impl.h"

namespace peft_ext {

const FormatTable kFormatTableNeon = make_table();

}  // namespace peft_ext
#endif
