// Host functions that launch the kernels for a mixture of experts. Each element type has a translation unit of its own.
#pragma once

#include "cuda/tensor.cuh"
#include "experts/cuda/dora.cuh"
#include "experts/cuda/product.cuh"

namespace peft_ext {

struct ProductVariant {
  bool nf4;
  StackOrder order;
  int64_t row_tiles;
};

template <typename T>
void launch_experts_product(const Launcher& launcher, const ExpertsProduct& work, const ProductVariant& variant);

// Launches experts_onto_kernel, which works on a product that `work.out` holds already.
template <typename T>
void launch_experts_onto(const Launcher& launcher, const ExpertsProduct& work, bool whole, int64_t row_tiles);

template <typename T>
void launch_experts_norm(const Launcher& launcher, const StackNorm& work, bool nf4, bool whole, int64_t experts);

template <typename T>
void launch_scale_runs(const Launcher& launcher, const ScaleRuns& work, bool whole, int64_t row_tiles);

}  // namespace peft_ext
