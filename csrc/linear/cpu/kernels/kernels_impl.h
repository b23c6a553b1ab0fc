// Includes the code of all kernels of kernels.h for one instruction set, so that the file that includes kernels_impl.h
// can fill the instruction set's table PassKernels. Include this file after the target pragma (cpu/target_<isa>.h) and
// after the instruction set's Vec (cpu/simd_<isa>.h).
#pragma once

#include "linear/cpu/kernels/column_pass.h"
#include "linear/cpu/kernels/dropped.h"
#include "linear/cpu/kernels/expand.h"
#include "linear/cpu/kernels/few_tokens.h"
#include "linear/cpu/kernels/rank_pass.h"
