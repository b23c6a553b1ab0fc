// How far ahead the products of few tokens prefetch the matrix W, which they read once, row by row. The computation of
// a short row takes less time than main memory needs for an answer, so a prefetch of the next rows would come too late.
// The hardware prefetcher does not follow several rows that are read at a time. W is prefetched into L2, not into L1: a
// line on its way to L1 occupies one of a core's few buffers for L1 misses until main memory has answered, and then the
// kernel's own loads wait for a buffer.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace peft_ext {
namespace {

constexpr int kIntoL2 = 2;                // the locality with which __builtin_prefetch prefetches into L2
constexpr int64_t kPrefetchBytes = 8192;  // the smallest distance from the bytes that are read to those prefetched

// Returns the distance in bytes of a kernel that reads whole rows with together `bytes` bytes at a time: the
// smallest multiple of `bytes` that is at least kPrefetchBytes. A prefetch behind the end of W has no effect.
inline int64_t prefetch_distance(int64_t bytes) {
  return bytes > 0 ? ceil_div(kPrefetchBytes, bytes) * bytes : 0;  // rows of rank 0 have no bytes
}

// Prefetches `count` elements that lie `ahead` bytes behind `from` into L2.
template <typename T>
inline void prefetch(const T* from, int64_t count, int64_t ahead) {
  const char* bytes = reinterpret_cast<const char*>(from) + ahead;
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, kIntoL2);
}

}  // namespace
}  // namespace peft_ext
