// The macros of amx.h in plain C++, so that the AMX kernels can be tested on a CPU without AMX. The order of the sums
// is the order of the AMX instruction: the even-numbered and the odd-numbered products of a row are summed separately,
// and the total of these two sums is added to the old sum. The process aborts if a tile register is used before
// amx_configure().
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

thread_local unsigned char amx_tiles[8][1024];
thread_local bool amx_configured;

inline void amx_configure() {
  memset(amx_tiles, 0, sizeof(amx_tiles));
  amx_configured = true;
}
inline void amx_release() { amx_configured = false; }

inline unsigned char* amx_tile(int tile) {
  if (!amx_configured) abort();
  return amx_tiles[tile];
}

inline void amx_load(int tile, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(amx_tile(tile) + 64 * r, static_cast<const char*>(base) + r * stride, 64);
}

inline void amx_store(int tile, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(base) + r * stride, amx_tile(tile) + 64 * r, 64);
}

inline void amx_product(int sums, int rows, int lanes) {
  bf16 left[16][32], right[16][32];
  float c[16][16];
  memcpy(left, amx_tile(rows), sizeof(left));
  memcpy(right, amx_tile(lanes), sizeof(right));
  memcpy(c, amx_tile(sums), sizeof(c));
  for (int r = 0; r < 16; ++r) {
    float even[16] = {}, odd[16] = {};
    for (int pair = 0; pair < 16; ++pair)
      for (int j = 0; j < 16; ++j) {
        even[j] = __builtin_fmaf(to_float(left[r][2 * pair]), to_float(right[pair][2 * j]), even[j]);
        odd[j] = __builtin_fmaf(to_float(left[r][2 * pair + 1]), to_float(right[pair][2 * j + 1]), odd[j]);
      }
    for (int j = 0; j < 16; ++j) c[r][j] += even[j] + odd[j];
  }
  memcpy(amx_tile(sums), c, sizeof(c));
}

}  // namespace
}  // namespace peft_ext

#define AMX_LOAD(tile, base) memcpy(amx_tile(tile), base, 1024)
#define AMX_LOAD_ROWS(tile, base, stride) amx_load(tile, base, stride)
#define AMX_STORE(tile, base) memcpy(base, amx_tile(tile), 1024)
#define AMX_STORE_ROWS(tile, base, stride) amx_store(tile, base, stride)
#define AMX_ZERO(tile) memset(amx_tile(tile), 0, 1024)
#define AMX_PRODUCT(sums, rows, lanes) amx_product(sums, rows, lanes)
#define AMX_MEMORY_BARRIER()
