// Selects and launches the instance of rank_gated_kernel that computes a GatedPass. rank_gated_<type>_cuda.cpp contains
// the instances of an element type.
#pragma once

#include "gated_lora/cuda/gated_linear.cuh"
#include "gated_lora/cuda/rank_gated.cuh"
#include "linear/cuda/passes.cuh"

namespace peft_ext {

template <typename T, int kRanks, int kTerms, bool kColumns, bool kDropped>
void launch_gated_of(const Launcher& launcher, const Grid& grid, const GatedPass& pass) {
  if (pass.gated.activation == Activation::kSilu) {
    launcher(rank_gated_kernel<T, kRanks, kTerms, kColumns, kDropped, true>, grid, kRankThreads, pass);
  } else {
    launcher(rank_gated_kernel<T, kRanks, kTerms, kColumns, kDropped, false>, grid, kRankThreads, pass);
  }
}

template <typename T, int kRanks, int kTerms, bool kColumns>
void launch_gated_of(const Launcher& launcher, const Grid& grid, const GatedPass& pass) {
  pass.dropout.active ? launch_gated_of<T, kRanks, kTerms, kColumns, true>(launcher, grid, pass)
                      : launch_gated_of<T, kRanks, kTerms, kColumns, false>(launcher, grid, pass);
}

template <typename T, int kRanks>
void launch_gated_of(const Launcher& launcher, const Grid& grid, const GatedPass& pass, const GatedVariant& variant) {
  if (variant.columns) return launch_gated_of<T, kRanks, kMaxTerms, true>(launcher, grid, pass);
  if constexpr (std::is_same_v<T, bf16>) {
    if (variant.terms == 1) return launch_gated_of<T, kRanks, 1, false>(launcher, grid, pass);
  }
  launch_gated_of<T, kRanks, kMaxTerms, false>(launcher, grid, pass);
}

template <typename T>
void launch_gated(const Launcher& launcher, const Grid& grid, const GatedPass& pass, const GatedVariant& variant) {
  variant.ranks == 16 ? launch_gated_of<T, 2>(launcher, grid, pass, variant)
                      : launch_gated_of<T, 4>(launcher, grid, pass, variant);
}

}  // namespace peft_ext
