// Which rank_pass_kernel a pass takes; each element type's are compiled in rank_pass_<type>_cuda.cu.
#pragma once

#include "linear/cuda/passes.cuh"

namespace peft_ext {

template <typename T, bool kNf4, int kRanks>
void launch_pass(const Launcher& launcher, const Grid& grid, RankPass pass, bool rows, bool columns) {
  for (pass.first_rank = 0; pass.first_rank < pass.padded_rank; pass.first_rank += kRanks * 8) {
    if (rows && columns) {
      if constexpr (!kNf4 && kRanks < 8) {
        launcher(rank_pass_kernel<T, kNf4, kRanks, 8 / kRanks, true, true>, grid, kRankThreads, pass);
      }
    } else if (rows) {
      launcher(rank_pass_kernel<T, kNf4, kRanks, 1, true, false>, grid, kRankThreads, pass);
    } else {
      launcher(rank_pass_kernel<T, kNf4, kRanks, 0, false, true>, grid, kRankThreads, pass);
    }
  }
}

template <typename T, bool kNf4>
void launch_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass, bool rows, bool columns) {
  if (pass.padded_rank == 16) {
    launch_pass<T, kNf4, 2>(launcher, grid, pass, rows, columns);
  } else if (pass.padded_rank == 32) {
    launch_pass<T, kNf4, 4>(launcher, grid, pass, rows, columns);
  } else {
    launch_pass<T, kNf4, 8>(launcher, grid, pass, rows, columns);
  }
}

template <typename T>
void launch_rank_pass(const Launcher& launcher, const Grid& grid, const RankPass& pass, bool nf4, bool rows,
                      bool columns) {
  if (nf4) {
    launch_pass<T, true>(launcher, grid, pass, rows, columns);
  } else {
    launch_pass<T, false>(launcher, grid, pass, rows, columns);
  }
}

}  // namespace peft_ext
