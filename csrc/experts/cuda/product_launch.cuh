// Which of the experts' kernels a call takes; each element type's are compiled in experts_product_<type>_cuda.cu.
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

}  // namespace peft_ext
