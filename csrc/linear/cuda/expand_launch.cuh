// Selects the instance of expand_kernel for a call. expand_<type>_cuda.cpp contains the instances of an element type.
#pragma once

#include "linear/cuda/passes.cuh"

namespace peft_ext {

template <typename T, int kSteps, int kRightTerms, ExpandWork kWork>
void launch_expand(const Launcher& launcher, const ExpandTerms& work) {
  launcher(expand_kernel<T, kSteps, kRightTerms, kWork>, {work.tiles, ceil_div(work.columns, kExpandTile)},
           kExpandThreads, work);
}

template <typename T, int kRightTerms>
void launch_expand_terms(const Launcher& launcher, const ExpandTerms& work, bool whole) {
  const auto with_steps = [&](auto launch_one, auto launch_two, auto launch_any) {
    const int64_t steps = work.left.inner / 16;
    steps == 1 ? launch_one(launcher, work) : steps == 2 ? launch_two(launcher, work) : launch_any(launcher, work);
  };
  if (work.table.tiles != nullptr) {
    if (!whole) return launch_expand<T, 0, kRightTerms, ExpandWork::kGroupedAny>(launcher, work);
    return with_steps(launch_expand<T, 1, kRightTerms, ExpandWork::kGrouped>,
                      launch_expand<T, 2, kRightTerms, ExpandWork::kGrouped>,
                      launch_expand<T, 0, kRightTerms, ExpandWork::kGrouped>);
  }
  if (!whole) return launch_expand<T, 0, kRightTerms, ExpandWork::kAny>(launcher, work);
  if (work.kept != nullptr)
    return with_steps(launch_expand<T, 1, kRightTerms, ExpandWork::kMask>,
                      launch_expand<T, 2, kRightTerms, ExpandWork::kMask>,
                      launch_expand<T, 0, kRightTerms, ExpandWork::kMask>);
  if (work.dropout.active)
    return with_steps(launch_expand<T, 1, kRightTerms, ExpandWork::kDrawn>,
                      launch_expand<T, 2, kRightTerms, ExpandWork::kDrawn>,
                      launch_expand<T, 0, kRightTerms, ExpandWork::kDrawn>);
  if (work.before != nullptr || work.z != nullptr)
    return with_steps(launch_expand<T, 1, kRightTerms, ExpandWork::kOnto>,
                      launch_expand<T, 2, kRightTerms, ExpandWork::kOnto>,
                      launch_expand<T, 0, kRightTerms, ExpandWork::kOnto>);
  with_steps(launch_expand<T, 1, kRightTerms, ExpandWork::kBias>, launch_expand<T, 2, kRightTerms, ExpandWork::kBias>,
             launch_expand<T, 0, kRightTerms, ExpandWork::kBias>);
}

template <typename T>
void launch_expand(const Launcher& launcher, const ExpandTerms& work, bool whole) {
  if (std::is_same_v<T, bf16> && work.right.count == 1) {
    if constexpr (std::is_same_v<T, bf16>) launch_expand_terms<T, 1>(launcher, work, whole);
  } else {
    launch_expand_terms<T, kExpandLeftTerms<T>>(launcher, work, whole);
  }
}

template <typename T>
void launch_expand_sum(const Launcher& launcher, const ExpandSum& work) {
  const Grid grid(ceil_div(work.rows, kExpandTile), ceil_div(work.columns, kExpandTile));
  if (std::is_same_v<T, bf16> && work.parts[0].right.count == 1) {
    if constexpr (std::is_same_v<T, bf16>) launcher(expand_sum_kernel<T, 1>, grid, kExpandThreads, work);
  } else {
    launcher(expand_sum_kernel<T, kExpandLeftTerms<T>>, grid, kExpandThreads, work);
  }
}

}  // namespace peft_ext
