// Compiles the AMX tile kernels with emulated tile instructions, for a CPU with AVX512-BF16.
#if defined(__x86_64__)
#include "cpu/target_avx512bf16.h"
// The headers below must be included after the target pragma (cpu/target_<isa>.h).
#include "linear/cpu/tiles/amx_emulated.h"
#include "linear/cpu/tiles/microkernel_amx.h"
#include "linear/cpu/tiles/tiles_avx512.h"

namespace peft_ext {

const TileKernels kTileKernelsAmxEmulated = {kDecodeStrips, left_strips, right_strips, dropped_entries,
                                             forward,       backward,    few_tokens,   few_tokens_pack};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
