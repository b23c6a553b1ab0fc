// Selects and launches the instance of rank_pass_kernel that computes a RankPass (a product of a large matrix with a
// matrix of R columns). rank_pass_<type>_cuda.cpp and rank_runs_<type>_cuda.cpp contain the instances of an element
// type.
#pragma once

#include "linear/cuda/passes.cuh"

namespace peft_ext {

template <typename T, bool kNf4, bool kWhole, int kRanks, int kTerms, RankWork kWork, RankMask kMask>
void launch_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass) {
  launcher(rank_pass_kernel<T, kNf4, kWhole, kRanks, kTerms, kWork, kMask>, grid, kRankThreads, pass);
}

// Launches one pass for 16 or 32 ranks, or one or more passes for more than 32 ranks. For more than 32 ranks, a pass
// computes 128 ranks if kWhole is true, D has a 16-bit dtype and there are no runs of experts; the last pass may
// compute 64 ranks. In all other cases, a pass computes 64 ranks, because other data, for example the terms of a
// float32 D, needs registers too.
template <typename T, bool kNf4, bool kWhole, int kTerms, RankWork kWork, RankMask kMask>
void launch_ranks(const Launcher& launcher, const Grid& grid, RankPass pass) {
  if (pass.padded_rank == 16) return launch_pass<T, kNf4, kWhole, 2, kTerms, kWork, kMask>(launcher, grid, pass);
  if (pass.padded_rank == 32) return launch_pass<T, kNf4, kWhole, 4, kTerms, kWork, kMask>(launcher, grid, pass);
  if constexpr (kWork != RankWork::kBoth && kWork != RankWork::kBothAndDots) {
    constexpr bool kRuns = kWork == RankWork::kRunRows || kWork == RankWork::kRunColumns;
    constexpr bool kTwice = kWhole && sizeof(T) == 2 && !kRuns;
    for (; pass.first_rank < pass.padded_rank; pass.first_rank += 64) {
      // The sums of squares of D's rows do not depend on the ranks, so that each launch computes and writes the same
      // sums.
      if (kTwice && pass.first_rank + 128 <= pass.padded_rank) {
        if constexpr (kTwice) launch_pass<T, kNf4, kWhole, 16, kTerms, kWork, kMask>(launcher, grid, pass);
        pass.first_rank += 64;
      } else {
        launch_pass<T, kNf4, kWhole, 8, kTerms, kWork, kMask>(launcher, grid, pass);
      }
    }
  }
}

template <typename T, bool kNf4, bool kWhole, RankWork kWork, RankMask kMask>
void launch_terms(const Launcher& launcher, const Grid& grid, const RankPass& pass) {
  if constexpr (std::is_same_v<T, bf16> && kWork != RankWork::kColumns && kWork != RankWork::kRunColumns) {
    if (pass.right.count == 1) return launch_ranks<T, kNf4, kWhole, 1, kWork, kMask>(launcher, grid, pass);
  }
  launch_ranks<T, kNf4, kWhole, kMaxTerms, kWork, kMask>(launcher, grid, pass);
}

template <typename T, bool kNf4, bool kWhole>
void launch_work(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant) {
  switch (variant.work) {
    case RankWork::kRows:
      if constexpr (!kNf4) {
        if (kWhole && variant.mask == RankMask::kDrawn)
          return launch_terms<T, kNf4, kWhole, RankWork::kRows, kWhole ? RankMask::kDrawn : RankMask::kNone>(
              launcher, grid, pass);
        launch_terms<T, kNf4, kWhole, RankWork::kRows, RankMask::kNone>(launcher, grid, pass);
      }
      return;
    case RankWork::kRowsAndSquares:
      return launch_terms<T, kNf4, kWhole, RankWork::kRowsAndSquares, RankMask::kNone>(launcher, grid, pass);
    case RankWork::kBoth:
      if constexpr (!kNf4) launch_terms<T, kNf4, kWhole, RankWork::kBoth, RankMask::kNone>(launcher, grid, pass);
      return;
    case RankWork::kBothAndDots:
      if constexpr (!kNf4 && kWhole)
        launch_terms<T, kNf4, kWhole, RankWork::kBothAndDots, RankMask::kNone>(launcher, grid, pass);
      return;
    case RankWork::kGroupedRows:
      if constexpr (!kNf4) launch_terms<T, kNf4, kWhole, RankWork::kGroupedRows, RankMask::kNone>(launcher, grid, pass);
      return;
    case RankWork::kColumns:
      if constexpr (!kNf4 && kWhole) {
        if (variant.mask == RankMask::kKept)
          return launch_terms<T, kNf4, kWhole, RankWork::kColumns, RankMask::kKept>(launcher, grid, pass);
        if (variant.mask == RankMask::kDrawn)
          return launch_terms<T, kNf4, kWhole, RankWork::kColumns, RankMask::kDrawn>(launcher, grid, pass);
      }
      launch_terms<T, kNf4, kWhole, RankWork::kColumns, RankMask::kNone>(launcher, grid, pass);
      return;
    default:  // launch_rank_runs handles kRunRows and kRunColumns
      return;
  }
}

// Launches a pass over the rows of each expert. If variant.whole is false, rank_copy_any applies the dropout mask while
// copying a tile to shared memory, and the kernel is launched with RankMask::kNone.
template <typename T>
void launch_rank_runs(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant) {
  constexpr RankMask kNone = RankMask::kNone, kDrawn = RankMask::kDrawn, kKept = RankMask::kKept;
  const bool masked = variant.mask != kNone;
  if (variant.work == RankWork::kRunRows) {
    if (!variant.whole) return launch_terms<T, false, false, RankWork::kRunRows, kNone>(launcher, grid, pass);
    if (masked) return launch_terms<T, false, true, RankWork::kRunRows, kDrawn>(launcher, grid, pass);
    return launch_terms<T, false, true, RankWork::kRunRows, kNone>(launcher, grid, pass);
  }
  if (!variant.whole) return launch_terms<T, false, false, RankWork::kRunColumns, kNone>(launcher, grid, pass);
  if (masked) return launch_terms<T, false, true, RankWork::kRunColumns, kKept>(launcher, grid, pass);
  launch_terms<T, false, true, RankWork::kRunColumns, kNone>(launcher, grid, pass);
}

template <typename T>
void launch_rank_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass, const RankVariant& variant) {
  if (variant.nf4) {
    variant.whole ? launch_work<T, true, true>(launcher, grid, pass, variant)
                  : launch_work<T, true, false>(launcher, grid, pass, variant);
  } else {
    variant.whole ? launch_work<T, false, true>(launcher, grid, pass, variant)
                  : launch_work<T, false, false>(launcher, grid, pass, variant);
  }
}

}  // namespace peft_ext
