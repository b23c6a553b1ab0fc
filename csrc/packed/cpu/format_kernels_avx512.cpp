// The kernels of format_kernels.h with AVX-512.
#if defined(__x86_64__)
#include "cpu/target_avx512.h"
// The headers below must be included after the target pragma.
#include "cpu/simd_avx512.h"
#include "packed/cpu/lookup_avx512.h"
#include "packed/cpu/format_kernels_impl.h"

namespace peft_ext {

const FormatTable kFormatTableAvx512 = make_table();

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
