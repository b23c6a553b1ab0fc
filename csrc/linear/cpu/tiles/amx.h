// Macros for the tile instructions of AMX-BF16. The definitions are macros because the number of a tile register is
// part of the instruction. A tile register has 16 rows of 64 bytes. Include this file after target_amx.h.
// amx_emulated.h defines the same macros in plain C++.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace peft_ext {
namespace {

struct alignas(64) AmxConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void amx_configure() {
  const AmxConfig config;
  _tile_loadconfig(&config);
}
inline void amx_release() { _tile_release(); }

}  // namespace
}  // namespace peft_ext

// Loads a tile register from 1 KiB of contiguous memory.
#define AMX_LOAD(tile, base) _tile_loadd(tile, base, 64)
// Loads a tile register from rows that are `stride` bytes apart.
#define AMX_LOAD_ROWS(tile, base, stride) _tile_loadd(tile, base, stride)
#define AMX_STORE(tile, base) _tile_stored(tile, base, 64)
// Stores a tile register to rows that are `stride` bytes apart.
#define AMX_STORE_ROWS(tile, base, stride) _tile_stored(tile, base, stride)
#define AMX_ZERO(tile) _tile_zero(tile)
// Computes sums [16][16] += rows [16][32] lanes [16 pairs][16][2].
#define AMX_PRODUCT(sums, rows, lanes) _tile_dpbf16ps(sums, rows, lanes)
// The compiler does not know that a tile load reads memory. This barrier makes the compiler place earlier stores before
// the load.
#define AMX_MEMORY_BARRIER() __asm__ volatile("" ::: "memory")
