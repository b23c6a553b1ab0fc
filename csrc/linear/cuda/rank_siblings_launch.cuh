// Selects and launches the instance of rank_siblings_kernel that computes a SiblingsPass (a pass over an x that several
// layers share). rank_siblings_<type>_cuda.cpp contains the instances of an element type.
#pragma once

#include "linear/cuda/passes.cuh"
#include "linear/cuda/rank_siblings.cuh"

namespace peft_ext {

template <typename T, int kRanks, int kTerms, bool kColumns, bool kDropped>
void launch_siblings_of(const Launcher& launcher, const Grid& grid, int warps, const SiblingsPass& pass) {
  const int64_t shared = kSiblingStages<kDropped> * kSiblingTile + (kDropped ? warps * kSiblingBytes : 0);
  launcher(rank_siblings_kernel<T, kRanks, kTerms, kColumns, kDropped>, grid, Block(warps * kWarpSize, shared), pass);
}

template <typename T, int kRanks, int kTerms, bool kColumns>
void launch_siblings_of(const Launcher& launcher, const Grid& grid, int warps, const SiblingsPass& pass, bool dropped) {
  dropped ? launch_siblings_of<T, kRanks, kTerms, kColumns, true>(launcher, grid, warps, pass)
          : launch_siblings_of<T, kRanks, kTerms, kColumns, false>(launcher, grid, warps, pass);
}

template <typename T, int kRanks>
void launch_siblings_of(const Launcher& launcher, const Grid& grid, int warps, const SiblingsPass& pass,
                        const SiblingVariant& variant) {
  if (variant.columns)
    return launch_siblings_of<T, kRanks, kMaxTerms, true>(launcher, grid, warps, pass, variant.dropped);
  if constexpr (std::is_same_v<T, bf16>) {
    if (variant.terms == 1)
      return launch_siblings_of<T, kRanks, 1, false>(launcher, grid, warps, pass, variant.dropped);
  }
  launch_siblings_of<T, kRanks, kMaxTerms, false>(launcher, grid, warps, pass, variant.dropped);
}

template <typename T>
void launch_siblings(const Launcher& launcher, const Grid& grid, int warps, const SiblingsPass& pass,
                     const SiblingVariant& variant) {
  variant.ranks == 16 ? launch_siblings_of<T, 2>(launcher, grid, warps, pass, variant)
                      : launch_siblings_of<T, 4>(launcher, grid, warps, pass, variant);
}

}  // namespace peft_ext
