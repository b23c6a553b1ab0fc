// Definitions of the launch functions of product_call.cuh, which select a kernel instance for a call. Included only by
// experts_product_<type>_cuda.cpp.
#pragma once

#include "experts/cuda/product_call.cuh"

namespace peft_ext {

template <typename T, bool kNf4>
void launch_experts_order(const Launcher& launcher, const ExpertsProduct& work, const ProductVariant& variant) {
  const auto kernel = variant.order == StackOrder::kAlong    ? experts_product_kernel<T, kNf4, StackOrder::kAlong>
                      : variant.order == StackOrder::kAcross ? experts_product_kernel<T, kNf4, StackOrder::kAcross>
                                                             : experts_product_kernel<T, kNf4, StackOrder::kAny>;
  launcher(kernel, variant.row_tiles * work.column_tiles, kProductThreads, work);
}

template <typename T>
void launch_experts_product(const Launcher& launcher, const ExpertsProduct& work, const ProductVariant& variant) {
  variant.nf4 ? launch_experts_order<T, true>(launcher, work, variant)
              : launch_experts_order<T, false>(launcher, work, variant);
}

template <typename T>
void launch_experts_onto(const Launcher& launcher, const ExpertsProduct& work, bool whole, int64_t row_tiles) {
  launcher(whole ? experts_onto_kernel<T, true> : experts_onto_kernel<T, false>, row_tiles * work.column_tiles,
           kExpandThreads, work);
}

template <typename T>
void launch_experts_norm(const Launcher& launcher, const StackNorm& work, bool nf4, bool whole, int64_t experts) {
  const auto kernel = nf4 ? (whole ? experts_norm_kernel<T, true, true> : experts_norm_kernel<T, true, false>)
                          : (whole ? experts_norm_kernel<T, false, true> : experts_norm_kernel<T, false, false>);
  launcher(kernel, {ceil_div(work.outputs, kExpandTile), experts}, kExpandThreads, work);
}

template <typename T>
void launch_scale_runs(const Launcher& launcher, const ScaleRuns& work, bool whole, int64_t row_tiles) {
  launcher(whole ? scale_runs_kernel<T, true> : scale_runs_kernel<T, false>,
           {row_tiles, ceil_div(work.columns, kScaleColumns)}, kScaleThreads, work);
}

}  // namespace peft_ext
