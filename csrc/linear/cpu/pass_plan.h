// Decides how passes over tokens are divided among threads. This file contains only arithmetic, and uses no PyTorch.
//
// Sums over tokens are computed per chunk of tokens, and the chunks' sums are added in order. The number of chunks
// depends only on the number of tokens, so that the results do not depend on the number of threads.
#pragma once

#include <stdint.h>

#include <algorithm>

namespace peft_ext {

// Number of tokens in the smallest unit that a pass gives to a thread; the same as the number of tokens in a strip of
// the tile kernels.
constexpr int64_t kTokenStep = 16;
constexpr int64_t kMinChunkTokens = 64;
constexpr int64_t kMaxChunks = 32;
// Numbers of columns in a thread's part of a chunk. Without dropout, a part has at least kBlockColumns columns. With
// dropout, a part has at least kMaskColumns columns, or fewer, down to kDrawnColumns, if narrower parts make the
// busiest thread faster (see block_columns). Philox computes 128 draws at a time, and the mask of 512 columns is a
// cache line.
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kDrawnColumns = 128;
constexpr int64_t kMaskColumns = 512;
// The cost of drawing an element's dropout, in multiplications.
constexpr int64_t kDrawCost = 12;
// The largest number of floats in the sums of the chunks that are kept at once (16 MiB). The sums take more memory if
// one chunk alone (in sum_chunks: one chunk per thread) needs more.
constexpr int64_t kMostSums = int64_t{1} << 22;
// The smallest number of multiplications for which a thread is started: a few microseconds of work.
constexpr int64_t kPassGrain = int64_t{1} << 17;

inline int64_t shares(int64_t count, int64_t of) { return (count + of - 1) / of; }

// Returns the number of tokens in a chunk. A thread sums the tokens of a chunk one after the other.
inline int64_t chunk_tokens(int64_t tokens) {
  return shares(std::max(kMinChunkTokens, shares(tokens, kMaxChunks)), kTokenStep) * kTokenStep;
}

// Returns the number of chunks of tokens whose sums are kept in memory at once.
inline int64_t chunks_together(int64_t tokens, int64_t columns, int64_t rank) {
  const int64_t chunks = shares(tokens, chunk_tokens(tokens));
  return std::min(chunks, std::max<int64_t>(1, kMostSums / std::max<int64_t>(1, columns * rank)));
}

// Returns the smallest number of parts that one thread should get, if each part has `multiplications` multiplications.
inline int64_t pass_grain(int64_t multiplications) { return shares(kPassGrain, std::max<int64_t>(1, multiplications)); }

// Returns the number of parts that the busiest thread gets from PyTorch's parallel_for.
inline int64_t busiest(int64_t parts, int64_t multiplications, int64_t threads) {
  return shares(parts, std::max<int64_t>(1, std::min(threads, shares(parts, pass_grain(multiplications)))));
}

// Each cost below is the number of multiplications of the busiest thread. row_pass_cost returns the cost of the product
// m · right, of shape [T, R], if the threads divide the tokens. m is [T, K], and right, here the transpose of
// RowPass::right, is [K, R].
inline int64_t row_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  const int64_t steps = busiest(shares(tokens, kTokenStep), kTokenStep * columns * rank, threads);
  return std::min(tokens, steps * kTokenStep) * columns * rank;
}

// Returns the cost of a pass over chunks of tokens, if the threads divide chunks_together chunks at a time, each into
// `blocks` blocks of columns.
inline int64_t chunks_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t blocks, int64_t threads) {
  const int64_t chunk = std::min(chunk_tokens(tokens), tokens), chunks = shares(tokens, chunk);
  const int64_t together = chunks_together(tokens, columns, rank), groups = chunks / together;
  const int64_t part = chunk * shares(columns, blocks) * rank;
  int64_t parts = groups * busiest(together * blocks, part, threads);
  if (chunks % together > 0) parts += busiest(chunks % together * blocks, part, threads);
  return std::min(parts * part, tokens * columns * rank);
}

// Returns the cost of the product mᵀ · left, of shape [K, R], if the threads divide only the columns of m. A thread
// then sums over all tokens, and no sums of single chunks are kept.
inline int64_t sums_by_columns_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads,
                                    int64_t block = kBlockColumns) {
  const int64_t blocks = shares(columns, block), part = tokens * std::min(block, columns) * rank;
  return std::min(busiest(blocks, part, threads) * part, tokens * columns * rank);
}

// Returns the cost of the product mᵀ · left, of shape [K, R], if the threads divide both the columns of m and the
// chunks of tokens.
inline int64_t sums_by_chunks_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads,
                                   int64_t block = kBlockColumns) {
  return chunks_cost(tokens, columns, rank, shares(columns, block), threads);
}

inline bool sums_by_columns(int64_t tokens, int64_t columns, int64_t rank, int64_t threads,
                            int64_t block = kBlockColumns) {
  return 7 * sums_by_columns_cost(tokens, columns, rank, threads, block) <=
         8 * sums_by_chunks_cost(tokens, columns, rank, threads, block);
}

inline int64_t outer_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads,
                               int64_t block = kBlockColumns) {
  return sums_by_columns(tokens, columns, rank, threads, block)
             ? sums_by_columns_cost(tokens, columns, rank, threads, block)
             : sums_by_chunks_cost(tokens, columns, rank, threads, block);
}

// Returns the number of columns in a part of the product mᵀ · left. With dropout, a part of kMaskColumns columns uses
// all draws, and writes whole cache lines of the mask; narrower parts are used only if they make the busiest thread an
// eighth faster.
inline int64_t block_columns(int64_t tokens, int64_t columns, int64_t rank, int64_t threads, bool dropout) {
  if (!dropout) return kBlockColumns;
  int64_t best = kMaskColumns;
  const auto cost = [&](int64_t block) { return outer_pass_cost(tokens, columns, rank + kDrawCost, threads, block); };
  for (int64_t block = kMaskColumns / 2; block >= kDrawnColumns; block /= 2)
    if (8 * cost(block) < 7 * cost(best)) best = block;
  return best;
}

// Returns the cost of one pass that computes both m · right and mᵀ · left. The threads divide only the chunks of
// tokens, because m · right needs all columns of a token.
inline int64_t row_and_outer_pass_cost(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  return 2 * chunks_cost(tokens, columns, rank, 1, threads);
}

// Returns whether two passes over m, one for m · right and one for mᵀ · left, cost less than seven eighths of one pass
// that computes both products. If there are fewer chunks than threads, or only a few more chunks than threads, some
// threads would have nothing to do in a single pass.
inline bool passes_apart(int64_t tokens, int64_t columns, int64_t rank, int64_t threads) {
  const int64_t apart = row_pass_cost(tokens, columns, rank, threads) + outer_pass_cost(tokens, columns, rank, threads);
  return 8 * apart < 7 * row_and_outer_pass_cost(tokens, columns, rank, threads);
}

}  // namespace peft_ext
