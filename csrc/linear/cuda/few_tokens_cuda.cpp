// Computes the forward for few tokens and a packed weight. In generation, launches of kernels take a large part of the
// time, so a call should make few launches. A call of up to kPackedFewTokens tokens with a weight in another format
// than NF4 needs one launch for S and one launch for all other work (packed_few_tokens.cuh). With an NF4 weight, the
// kernels for few tokens accept only 16-bit dtypes of x. A call of up to kFewTokens tokens with an NF4 weight needs one
// launch for S and one launch for all other work (nf4_few_tokens.cuh), if the weight's block size and number of inputs
// are multiples of kFewSlab = 64 and the weight has fewer than 2^32 slabs. Every other call that few_tokens_accept
// accepts needs two launches after S is computed (nf4_skinny.cuh). For a mixed batch of few tokens that
// few_tokens_accept refuses, skinny_finish_kernel computes the low-rank term and the bias, to which PyTorch's product
// is added.
#include "linear/cuda/call.cuh"
#include "linear/cuda/shrink_few.cuh"
#include "nf4/cuda/nf4_skinny.cuh"
#include "packed/cuda/packed_few_tokens.cuh"
#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {

bool few_tokens_accept(const DeviceWeight& weight, ScalarType type, int64_t tokens, const DeviceAdapter& adapter) {
  if (weight.is_packed() && !weight.is_nf4())
    return tokens <= kPackedFewTokens && !(adapter.drop_base && adapter.seed.has_value());
  return weight.is_nf4() && type != ScalarType::Float && tokens <= kSkinnyTokens && weight.inputs % 32 == 0 &&
         !(adapter.drop_base && adapter.seed.has_value());
}

void shrink_few(const Tensor& x, const DeviceAdapter& adapter, const DeviceSizes& size, const Tensor& s) {
  const Tensor a = matrix(adapter.lora_A);
  Launcher launcher(x);
  ShrinkFew work{};
  work.x = launcher.in<void>(x);
  work.lora_A = launcher.in<void>(a);
  work.type = dtype_of(a.scalar_type());
  work.tokens = size.tokens;
  work.inputs = size.inputs;
  work.rank = size.rank;
  work.whole = whole_columns(x, size.inputs);
  work.whole_A = whole_columns(a, size.inputs);
  work.dropout = device_dropout(launcher, adapter);
  work.s = launcher.scratch<float>(s);
  with_type(x.scalar_type(), [&](auto zero) {
    launcher(shrink_few_kernel<decltype(zero)>, {size.rank, ceil_div(size.tokens, kShrinkTokens)}, kShrinkThreads,
             work);
  });
}

namespace {

// Returns the number of thread blocks into which nf4_skinny_kernel's work should be divided. The number of thread
// blocks does not depend on the model of GPU, so that sums are equal on all GPUs. For more than 16 tokens there are
// fewer blocks, because a block's partial sums are larger.
int64_t skinny_blocks(int64_t tokens) { return tokens <= 16 ? 528 : 264; }

template <typename T>
void launch_skinny(const Launcher& launcher, const Skinny& work, const Grid& grid) {
  if (work.tokens <= 8) {
    launcher(nf4_skinny_kernel<T, 1>, grid, kSkinnyThreads, work);
  } else if (work.tokens <= 16) {
    launcher(nf4_skinny_kernel<T, 2>, grid, kSkinnyThreads, work);
  } else if (work.tokens <= 32) {
    launcher(nf4_skinny_kernel<T, 4>, grid, kSkinnyThreads, work);
  } else {
    launcher(nf4_skinny_kernel<T, 8>, grid, kSkinnyThreads, work);
  }
}

template <typename T>
void run_skinny(const Launcher& launcher, const Tensor& x, const DeviceSizes& size, Skinny work,
                const TokensFinish& finish) {
  // K, the number of inputs, is divided into slabs of kSkinnySlab inputs. The slabs are divided into as many parts as
  // give enough thread blocks, but into at most ceil(slabs / 4) parts, because the kernel loads up to four slabs ahead.
  const int64_t row_blocks = ceil_div(size.outputs, kSkinnyRows), slabs = ceil_div(size.inputs, kSkinnySlab);
  const int64_t wanted = std::min(ceil_div(skinny_blocks(size.tokens), row_blocks), ceil_div(slabs, 4));
  work.slabs_per_chunk = ceil_div(slabs, wanted);
  work.padded_outputs = row_blocks * kSkinnyRows;
  SkinnySums sums{};
  sums.chunks = ceil_div(slabs, work.slabs_per_chunk);
  sums.padded_outputs = work.padded_outputs;
  sums.tokens = work.tokens;
  sums.outputs = size.outputs;
  const Tensor partial = device_empty(x, {sums.chunks, size.tokens, work.padded_outputs}, ScalarType::Float);
  sums.partial = work.partial = launcher.scratch<float>(partial);
  launch_skinny<T>(launcher, work, Grid(row_blocks, sums.chunks));
  launcher(skinny_finish_kernel<T>, {ceil_div(size.outputs, kSkinnyThreads), ceil_div(size.tokens, kFinishTokens)},
           kSkinnyThreads, sums, finish);
}

template <typename T>
void run_few(const Launcher& launcher, const FewWork& work) {
  const bool nested = work.weight.nested_absmax != nullptr;
  const auto kernel = work.tokens <= 8 ? nested ? nf4_few_tokens_kernel<T, 1, true> : nf4_few_tokens_kernel<T, 1, false>
                      : nested         ? nf4_few_tokens_kernel<T, 2, true>
                                       : nf4_few_tokens_kernel<T, 2, false>;
  launcher(kernel, ceil_div(work.outputs, kFewRows), kFewThreads, work);
}

}  // namespace

void few_tokens_forward(const Tensor& x, const DeviceWeight& weight, const std::optional<Tensor>& bias,
                        const DeviceAdapter& adapter, const DeviceSizes& size, bool bias_inside,
                        const DeviceForward& out, const Tensor& y, bool want_z, const HeldFactors* factors) {
  Launcher launcher(x);
  const Tensor held = aligned(x, 16) ? x : torch::stable::clone(x);
  const Tensor b = size.rank > 0 ? matrix(adapter.lora_B) : Tensor();
  TokensFinish finish{};
  finish.rank = size.rank;
  finish.scaling = static_cast<float>(adapter.scaling);
  if (size.rank > 0) {
    finish.s = launcher.in<float>(out.s);
    finish.lora_B = launcher.in<void>(b);
    finish.lora_B_type = dtype_of(b.scalar_type());
    finish.rank_scale = launcher.in<float>(adapter.rank_scale);
  }
  if (factors != nullptr) {
    finish.factors = read_factors(launcher, *factors);
    finish.rank = out.s.size(1);
    finish.s = launcher.in<float>(out.s);
  }
  finish.scale = launcher.in<float>(adapter.out_scale);
  finish.bias_before = bias_inside ? launcher.in<void>(bias) : nullptr;
  finish.bias_after = bias_inside ? nullptr : launcher.in<void>(bias);
  finish.y = launcher.scratch<void>(y);
  finish.z = want_z ? launcher.scratch<void>(out.z) : nullptr;

  const void* data = launcher.in<void>(held);
  if (!weight.is_nf4()) {
    const bool whole = whole_columns(held, size.inputs);
    const PackedFew work{data, packed_view(launcher, weight), static_cast<int>(size.tokens), whole, finish};
    return launch_packed_few(launcher, work, format_number(weight.layout), x.scalar_type());
  }
  const Nf4View view = nf4_view(launcher, weight);
  const int tokens = static_cast<int>(size.tokens);
  // nf4_few_tokens_kernel numbers the slabs of W, each of which is kFewSlab columns of a row, with integers of 32 bits.
  const bool few = tokens <= kFewTokens && size.inputs % kFewSlab == 0 && weight.blocksize() % kFewSlab == 0 &&
                   size.outputs * (size.inputs / kFewSlab) < int64_t{1} << 32;
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      if (few) {
        run_few<T>(launcher, FewWork{data, view, size.outputs, size.inputs, tokens, finish});
      } else {
        run_skinny<T>(launcher, x, size, Skinny{data, view, size.outputs, size.inputs, tokens, 0, nullptr, 0}, finish);
      }
    }
  });
}

void expand_few(const Tensor& y, const Tensor& s, const HeldFactors& factors, const std::optional<Tensor>& bias) {
  Launcher launcher(y);
  SkinnySums none{};
  none.tokens = static_cast<int>(y.size(0));
  none.outputs = y.size(1);
  TokensFinish finish{};
  finish.factors = read_factors(launcher, factors);
  finish.rank = s.size(1);
  finish.s = launcher.in<float>(s);
  finish.bias_after = launcher.in<void>(bias);
  finish.y = launcher.scratch<void>(y);
  with_type(y.scalar_type(), [&](auto zero) {
    launcher(skinny_finish_kernel<decltype(zero)>,
             {ceil_div(none.outputs, kSkinnyThreads), ceil_div(none.tokens, kFinishTokens)}, kSkinnyThreads, none,
             finish);
  });
}

}  // namespace peft_ext
