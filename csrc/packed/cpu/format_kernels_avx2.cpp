// The kernels of format_kernels.h with AVX2.
#if defined(__x86_64__)
#include "cpu/target_avx2.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx2.h"
#include "packed/cpu/format_kernels_impl.h"

namespace peft_ext {

const FormatTable kFormatTableAvx2 = make_table();

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
