// Defines peft_ext::nf4_quantize and peft_ext::nf4_quantize_absmax on CUDA. Each of the two operators checks the
// arguments and, if the tensor has elements, launches one kernel.
#include "nf4/cuda/nf4_quantize.cuh"
#include "nf4/cuda/nf4_weight.cuh"

namespace peft_ext {
namespace {

// Returns a contiguous tensor aligned to 16 bytes: `tensor` itself, which is the usual case, or a copy.
Tensor dense_and_aligned(const Tensor& tensor) {
  const Tensor dense = as_contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

template <typename T>
void launch(const Tensor& weight, int log2_blocksize, const Tensor& packed, const Tensor& absmax) {
  const int64_t numel = weight.numel();
  Launcher launcher(weight);
  launcher(nf4_quantize_kernel<T>, ceil_div(numel, kQuantizeBlockTile), kQuantizeThreads, launcher.in<T>(weight), numel,
           log2_blocksize, launcher.out<uint8_t>(packed), launcher.out<float>(absmax));
}

std::tuple<Tensor, Tensor> nf4_quantize_absmax_cuda(const Tensor& centred, const Tensor& code) {
  STD_TORCH_CHECK(on_device(centred), "nf4_quantize_absmax: centred is not on a CUDA device");
  STD_TORCH_CHECK(centred.scalar_type() == ScalarType::Float, "nf4_quantize_absmax: centred is ",
                  torch::headeronly::toString(centred.scalar_type()), ", wanted Float");
  STD_TORCH_CHECK(
      same_device(code, centred),
      "nf4_quantize_absmax: code is on another device than centred, wanted cuda:", centred.get_device_index());
  STD_TORCH_CHECK(code.scalar_type() == ScalarType::Float && code.numel() == kNestedCodes,
                  "nf4_quantize_absmax: code is ", torch::headeronly::toString(code.scalar_type()), " with ",
                  code.numel(), " elements, wanted Float with ", kNestedCodes);
  const int64_t numel = centred.numel(), groups = ceil_div(numel, kNestedBlock);
  const Tensor codes = torch::stable::new_empty(centred, {numel}, ScalarType::Byte);
  const Tensor absmax = torch::stable::new_empty(centred, {groups}, ScalarType::Float);
  if (numel == 0) return {codes, absmax};

  const Tensor x = dense_and_aligned(centred), table = as_contiguous(code);
  Launcher launcher(x);
  launcher(nf4_quantize_absmax_kernel, ceil_div(groups, kQuantizeWarps), kQuantizeThreads, launcher.in<float>(x),
           launcher.in<float>(table), numel, launcher.out<uint8_t>(codes), launcher.out<float>(absmax));
  return {codes, absmax};
}

}  // namespace

std::tuple<Tensor, Tensor> nf4_quantized(const Tensor& weight, int64_t blocksize) {
  STD_TORCH_CHECK(on_device(weight), "nf4_quantize: weight is not on a CUDA device");
  STD_TORCH_CHECK(is_blocksize(blocksize), "nf4_quantize: blocksize is ", blocksize, ", wanted a power of two from ",
                  kSmallestBlock, " to ", kLargestBlock);
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                      dtype == ScalarType::Double,
                  "nf4_quantize: weight is ", torch::headeronly::toString(dtype),
                  ", wanted Float, BFloat16, Half or Double");
  const int64_t numel = weight.numel();
  const Tensor packed = torch::stable::new_empty(weight, {ceil_div(numel, 2), 1}, ScalarType::Byte);
  const Tensor absmax = torch::stable::new_empty(weight, {ceil_div(numel, blocksize)}, ScalarType::Float);
  if (numel == 0) return {packed, absmax};

  int log2_blocksize = 5;
  while ((int64_t{1} << log2_blocksize) < blocksize) ++log2_blocksize;
  const bool wide = dtype == ScalarType::Double;
  const Tensor w = dense_and_aligned(wide ? as_type(weight, ScalarType::Float) : weight);
  if (dtype == ScalarType::BFloat16) {
    launch<bf16>(w, log2_blocksize, packed, absmax);
  } else if (dtype == ScalarType::Half) {
    launch<f16>(w, log2_blocksize, packed, absmax);
  } else {
    launch<float>(w, log2_blocksize, packed, absmax);
  }
  return {packed, absmax};
}

}  // namespace peft_ext

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("nf4_quantize", PEFT_EXT_CUDA_BOX(&peft_ext::nf4_quantized));
  m.impl("nf4_quantize_absmax", PEFT_EXT_CUDA_BOX(&peft_ext::nf4_quantize_absmax_cuda));
}
