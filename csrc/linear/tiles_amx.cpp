// The tile kernels with AMX-BF16. The process asks for the tile registers once: see common/isa.cpp.
#if defined(__x86_64__)
#include "common/target_amx.h"
// The target must be set before these headers are read.
#include "linear/amx.h"
#include "linear/tiles_amx_impl.h"

namespace peft_ext {

const TileKernels kTileKernelsAmx = {kDecodeStrips, left_strips,     right_strips, forward, backward,
                                     few_tokens,    few_tokens_pack, shrink,       outer};

}  // namespace peft_ext
#include "common/target_end.h"
#endif
