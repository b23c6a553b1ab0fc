// How passes over tokens are cut among threads: arithmetic alone.
//
// Sums over tokens are made per chunk of them, whose number depends on the tokens alone, and added in order: whatever
// else is cut, no count of threads changes a bit.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace peft_ext {

// Rows that a pass takes together.
constexpr int64_t kTokenStep = 8;
constexpr int64_t kMinChunkTokens = 64;
constexpr int64_t kMaxChunks = 32;
// Columns of a chunk that a thread takes at least.
constexpr int64_t kBlockColumns = 64;
// Sums of chunks that are kept at once: 16 MiB, where one chunk's are not more.
constexpr int64_t kMostSums = int64_t{1} << 22;
// Multiplications that a thread takes at least: a few microseconds.
constexpr int64_t kPassGrain = int64_t{1} << 17;

inline int64_t shares(int64_t count, int64_t of) { return (count + of - 1) / of; }

// Tokens of a chunk whose sums are made together.
inline int64_t chunk_tokens(int64_t tokens) {
  return shares(std::max(kMinChunkTokens, shares(tokens, kMaxChunks)), kTokenStep) * kTokenStep;
}

// Chunks whose sums are kept at once.
inline int64_t chunks_together(int64_t tokens, int64_t columns, int64_t rank) {
  const int64_t chunks = shares(tokens, chunk_tokens(tokens));
  return std::min(chunks, std::max<int64_t>(1, kMostSums / std::max<int64_t>(1, columns * rank)));
}

// Parts that a thread takes at least, each of so many multiplications.
inline int64_t pass_grain(int64_t multiplications) { return shares(kPassGrain, std::max<int64_t>(1, multiplications)); }

// Parts of the busiest thread, cut as PyTorch's parallel_for does.
inline int64_t busiest(int64_t parts, int64_t multiplications, int64_t threads) {
  return shares(parts, std::max<int64_t>(1, std::min(threads, shares(parts, pass_grain(multiplications)))));
}

// out [T, R] = m [T, K] right, cut by tokens: multiplications of the busiest thread, as in what follows.
inline int64_t row_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  const int64_t steps = busiest(shares(tokens, kTokenStep), kTokenStep * columns * rank, threads);
  return std::min(tokens, steps * kTokenStep) * columns * rank;
}

// Of chunks, each cut into `blocks`, so many of them at once.
inline int64_t chunks_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t blocks, int64_t threads) {
  const int64_t chunk = std::min(chunk_tokens(tokens), tokens), chunks = shares(tokens, chunk);
  const int64_t together = chunks_together(tokens, columns, rank), groups = chunks / together;
  const int64_t part = chunk * shares(columns, blocks) * rank;
  int64_t parts = groups * busiest(together * blocks, part, threads);
  if (chunks % together > 0) parts += busiest(chunks % together * blocks, part, threads);
  return std::min(parts * part, tokens * columns * rank);
}

// mᵀ left [K, R], cut by columns alone: no chunk's sums are kept.
inline int64_t sums_by_columns_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  const int64_t blocks = shares(columns, kBlockColumns), part = tokens * std::min(kBlockColumns, columns) * rank;
  return std::min(busiest(blocks, part, threads) * part, tokens * columns * rank);
}

// The same, cut by chunks as well.
inline int64_t sums_by_chunks_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  return chunks_cost(tokens, columns, rank, shares(columns, kBlockColumns), threads);
}

inline bool sums_by_columns(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  return 7 * sums_by_columns_cost(tokens, columns, rank, threads) <=
         8 * sums_by_chunks_cost(tokens, columns, rank, threads);
}

inline int64_t outer_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  return sums_by_columns(tokens, columns, rank, threads) ? sums_by_columns_cost(tokens, columns, rank, threads)
                                                         : sums_by_chunks_cost(tokens, columns, rank, threads);
}

// Both at once, cut by chunks: out needs all columns of a token.
inline int64_t row_and_outer_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  return 2 * chunks_cost(tokens, columns, rank, 1, threads);
}

// Whether both are better made one after the other, though m is read twice then: with fewer chunks than threads, or a
// few more, some threads would wait.
inline bool passes_apart(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  const int64_t apart = row_pass_cost(tokens, columns, rank, threads) + outer_pass_cost(tokens, columns, rank, threads);
  return 8 * apart < 7 * row_and_outer_pass_cost(tokens, columns, rank, threads);
}

}  // namespace peft_ext
