// Declares RowBlock, a block of float32 rows that fits L1 and is used by expand.h, and the sizes of blocks that several
// kernels share. The kernels are written with the type Vec of cpu/simd_<isa>.h. Include this file after the target
// pragma (cpu/target_<isa>.h).
#pragma once

#include "cpu/philox_impl.h"
#include "cpu/token_groups.h"
#include "linear/cpu/kernels/kernels.h"

namespace peft_ext {
namespace {

constexpr int kTokens = kRowsTogether;
constexpr int kPanel = kColumnsTogether;

struct RowBlock {
  alignas(64) float values[kTokens][kPanel];
  alignas(64) uint16_t draws[draws_room(kPanel)];
};

}  // namespace
}  // namespace peft_ext
