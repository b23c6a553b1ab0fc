// Computes where a panel lies in W, decodes blocks of packed weights, and prefetches the next panel during the products
// with the present panel. Include this file after the target pragma (cpu/target_<isa>.h).
#pragma once

#include "linear/cpu/tiles/tiles.h"

namespace peft_ext {
namespace {

inline int64_t tiles_of(int64_t depth) { return ceil_div(depth, kTileDepth); }

// Returns whether W is an NF4 weight in which any kPanelStep columns that begin at a multiple of kPanelStep lie in one
// NF4 block and begin at a whole byte.
inline bool aligned_blocks(const TileWeight& w) {
  return w.packed != nullptr && w.columns % kPanelStep == 0 && (int64_t{1} << w.block_shift) % kPanelStep == 0;
}

// Returns whether W is dense and its rows [begin, end) consist of whole tiles, so that the kernels can read the rows
// without a copy.
inline bool whole_tiles(const TileWeight& w, int64_t begin, int64_t end) {
  return w.dense != nullptr && w.columns % kTileDepth == 0 && (end - begin) % kStrip == 0;
}

inline uint32_t first_bits(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1; }

inline const char* element_address(const TileWeight& w, int64_t flat) {
  if (w.decode != nullptr) return static_cast<const char*>(w.view.part[0]) + flat * w.row_bytes[0] / w.columns;
  return w.dense != nullptr ? reinterpret_cast<const char*>(w.dense + flat)
                            : reinterpret_cast<const char*>(w.packed + flat / 2);
}

// rows_ahead and columns_ahead return a description (Ahead in tiles.h) of the next panel's memory, which is prefetched
// during `steps` steps of the product. The next panel of the forward has the rows from `row` on and `tiles` tiles of
// their columns, from tile `from` on. The next panel of the backward has the columns from `column` on, which are one
// run of memory in each row of the tiles.
// If the codes of a packed weight are not stored row by row, nothing is prefetched.
inline Ahead rows_ahead(const TileWeight& w, int64_t row, int64_t count, int64_t from, int64_t tiles, int64_t steps) {
  const int64_t rows = w.decode != nullptr && w.row_bytes[0] == 0 ? 0 : min_i64(count, w.rows - row);
  if (rows <= 0 || steps <= 0) return Ahead{};
  const int64_t first = from * kTileDepth, last = min_i64(w.columns, first + tiles * kTileDepth);
  const char* at = element_address(w, row * w.columns + first);
  if (first == 0 && last == w.columns) {  // if the panel has all columns of W, the panel's rows are one contiguous run
    const int64_t runs = (element_address(w, (row + rows) * w.columns) - at) / 128;
    return Ahead{at, 0, runs, runs, ceil_div(runs, steps)};
  }
  const int64_t group = ceil_div(element_address(w, row * w.columns + last) - at, 128);
  return Ahead{at, element_address(w, w.columns) - element_address(w, 0), group, rows * group,
               ceil_div(rows * group, steps)};
}

inline Ahead columns_ahead(const TileWeight& w, int64_t column, int64_t count, int64_t from, int64_t tiles,
                           int64_t steps) {
  if (w.decode != nullptr && w.row_bytes[0] == 0) return Ahead{};
  const int64_t stride = element_address(w, w.columns) - element_address(w, 0);
  const int64_t row = from * kTileDepth, rows = min_i64(tiles * kTileDepth, w.rows - row);
  if (column >= w.columns || steps <= 0) return Ahead{};
  const char* at = element_address(w, row * w.columns + column);
  const int64_t stop = min_i64(w.columns, column + count);
  const int64_t group = ceil_div(element_address(w, row * w.columns + stop) - at, 128);
  const int64_t runs = rows * group;
  return Ahead{at, stride, group, runs, ceil_div(runs, steps), runs > 0 ? steps / runs : 1};
}

// Decodes a block of a packed weight by TileWeight::decode: the rows [row, row + count) and the columns [column, column
// + width), to out [count, stride], with zeros beyond the weight's rows and columns.
inline void decode_block(const TileWeight& w, int64_t row, int64_t count, int64_t column, int64_t width, bf16* out,
                         int64_t stride) {
  const int64_t rows = min_i64(count, w.rows - row), columns = min_i64(width, w.columns - column);
  if (rows < count || columns < width)
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j) out[i * stride + j] = bf16{0};
  if (rows > 0 && columns > 0) w.decode(w.view, row, rows, column, column + columns, out, stride, DType::kBF16);
}

constexpr int64_t kRowsAhead = 32;  // number of rows between the row that is decoded and the row that is prefetched

// Prefetches the columns [column, column + 64) of two rows, kRowsAhead rows before these rows are decoded. The rows of
// a large weight are half a page or more apart, and the hardware prefetcher does not cross pages.
inline void fetch_rows(const TileWeight& w, int64_t row, int64_t column) {
  if (w.decode != nullptr) {
    for (int part = 0; part < 2 && w.row_bytes[part] > 0; ++part)
      for (int64_t ahead = row + kRowsAhead; ahead < min_i64(row + kRowsAhead + 2, w.rows); ++ahead) {
        const char* at = static_cast<const char*>(w.view.part[part]) + ahead * w.row_bytes[part] +
                         column / kPanelStep * w.step_bytes[part];
        __builtin_prefetch(at, 0, 3);
        if (w.step_bytes[part] > 32) __builtin_prefetch(at + 64, 0, 3);
      }
    return;
  }
  for (int64_t ahead = row + kRowsAhead; ahead < min_i64(row + kRowsAhead + 2, w.rows); ++ahead) {
    const int64_t flat = ahead * w.columns + column;
    const char* at = element_address(w, flat);
    __builtin_prefetch(at, 0, 3);
    if (w.dense != nullptr) __builtin_prefetch(at + 64, 0, 3);
    if (w.packed != nullptr) __builtin_prefetch(w.absmax + (flat >> w.block_shift), 0, 3);
  }
}

// Prefetches the columns [column, column + 64) of the row that is decoded four rows later. weight_rows calls this
// function if a panel has only a part of each row, because the hardware prefetcher does not know where this part begins
// in the next row.
inline void fetch_row_part(const TileWeight& w, int64_t row, int64_t column) {
  const int64_t flat = min_i64(row + 4, w.rows - 1) * w.columns + column;
  __builtin_prefetch(element_address(w, flat), 0, 3);
  if (w.dense != nullptr) __builtin_prefetch(w.dense + flat + 32, 0, 3);
  if (w.packed != nullptr) __builtin_prefetch(w.absmax + (flat >> w.block_shift), 0, 3);
}

}  // namespace
}  // namespace peft_ext
