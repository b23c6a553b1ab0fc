// The tile kernels but for the microkernel: after this file a kernel table can be filled. Included after the target
// pragma and the microkernel's file (see block.h).
#pragma once

#include "linear/cpu/tiles/backward.h"
#include "linear/cpu/tiles/few_tokens.h"
#include "linear/cpu/tiles/forward.h"
#include "linear/cpu/tiles/strips.h"
