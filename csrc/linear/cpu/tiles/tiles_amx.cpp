// Compiles the tile kernels of tiles.h for AMX-BF16. cpu/isa.cpp requests the tile registers from the system, once per
// process.
#if defined(__x86_64__)
#include "cpu/target_amx.h"
// The headers below must be included after the target pragma (cpu/target_<isa>.h).
#include "linear/cpu/tiles/amx.h"
#include "linear/cpu/tiles/microkernel_amx.h"
#include "linear/cpu/tiles/tiles_avx512.h"

namespace peft_ext {

const TileKernels kTileKernelsAmx = {kDecodeStrips, left_strips, right_strips, dropped_entries,
                                     forward,       backward,    few_tokens,   few_tokens_pack};

}  // namespace peft_ext
#include "cpu/target_end.h"
#endif
