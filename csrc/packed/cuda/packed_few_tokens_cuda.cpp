// Selects the instance of the kernel in packed_few_tokens.cuh.
#include "packed/cuda/packed_few_tokens.cuh"

#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {

void launch_packed_few(const Launcher& launcher, const PackedFew& work, int64_t format, ScalarType type) {
  with_format(format, [&](auto number) {
    with_type(type, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kNumber = decltype(number)::value;
      const auto kernel = work.tokens == 1   ? packed_few_tokens_kernel<kNumber, T, 1>
                          : work.tokens <= 4 ? packed_few_tokens_kernel<kNumber, T, 4>
                                             : packed_few_tokens_kernel<kNumber, T, 8>;
      launcher(kernel, ceil_div(work.weight.rows, kPackedFewRows), kPackedFewThreads, work);
    });
  });
}

}  // namespace peft_ext
