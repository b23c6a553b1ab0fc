// Host functions that launch the kernels for a mixture of experts. experts_product_<type>_cuda.cpp instantiates these
// functions for one element type.
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

// Launches experts_onto_kernel, which adds the low-rank term to the product that `work.out` holds already, multiplies
// by DoRA's scale g, and adds the bias.
template <typename T>
void launch_experts_onto(const Launcher& launcher, const ExpertsProduct& work, bool whole, int64_t row_tiles);

template <typename T>
void launch_experts_norm(const Launcher& launcher, const StackNorm& work, bool nf4, bool whole, int64_t experts);

template <typename T>
void launch_scale_runs(const Launcher& launcher, const ScaleRuns& work, bool whole, int64_t row_tiles);

}  // namespace peft_ext
