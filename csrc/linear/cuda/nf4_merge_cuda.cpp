// peft_ext::nf4_dequantize_merged on CUDA checks the arguments and launches one kernel, which computes the merged
// weight. If the weight has another packed format than NF4, the weight is decoded first. peft_ext::nf4_merge also
// quantizes the merged weight to NF4, and computes the error of the quantization.
#include "nf4/cuda/nf4_merge.cuh"

#include <algorithm>
#include <string>
#include <tuple>

#include "nf4/cuda/nf4_weight.cuh"
#include "packed/cuda/packed_weight.cuh"

namespace peft_ext {
namespace {

constexpr const char* kOp = "nf4_dequantize_merged";

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

// Returns lora_A, lora_B or row_scale as float32, aligned to 16 bytes. The argument may be float32, bfloat16, float16
// or float64.
Tensor factor(const char* name, const Tensor& tensor, const Tensor& weight) {
  check_same_device(kOp, name, tensor, weight, "weight");
  STD_TORCH_CHECK(is_float(tensor.scalar_type()), kOp, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", wanted Float, BFloat16, Half or Double");
  const Tensor wide = as_contiguous(as_type(tensor, ScalarType::Float));
  return aligned(wide, 16) ? wide : torch::stable::clone(wide);
}

template <typename T>
void launch(const Launcher& launcher, const Nf4Merge& merge, const Tensor& out) {
  const int64_t tiles = ceil_div(merge.rows, kMergeRows) * ceil_div(merge.columns, kMergeColumns);
  const auto kernel = merge.columns % kMergeChunk == 0 ? nf4_merge_kernel<T, true> : nf4_merge_kernel<T, false>;
  launcher(kernel, tiles, kMergeThreads, merge, launcher.out<T>(out));
}

// A weight in another packed format than NF4 is decoded to a float32 tensor [N, K], which the kernel reads. The decoded
// tensor takes 4 N K bytes during the call.
Tensor nf4_dequantize_merged_cuda(const Tensor& weight, const std::optional<Tensor>& part1,
                                  const std::optional<Tensor>& part2, const std::optional<Tensor>& part3,
                                  const std::optional<Tensor>& part4, int64_t layout, const std::vector<int64_t>& shape,
                                  const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& row_scale,
                                  double scaling, ScalarType dtype) {
  STD_TORCH_CHECK(shape.size() == 2, kOp, ": shape has ", shape.size(), " dimensions, wanted [N, K]");
  STD_TORCH_CHECK(is_float(dtype), kOp, ": dtype is ", torch::headeronly::toString(dtype),
                  ", wanted Float, BFloat16, Half or Double");
  const int64_t rows = shape[0], columns = shape[1];
  const DeviceParts parts{part1, part2, part3, part4};
  const bool nf4 = format_number(layout) == 0;
  const DeviceWeight held = nf4 ? nf4_weight(kOp, weight, parts, layout, rows, columns)
                                : device_weight(kOp, weight, parts, layout, shape, ScalarType::Float);
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == columns, kOp, ": lora_A has shape ", shape_of(lora_A),
                  ", wanted [R, ", columns, "]");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == rows, kOp, ": lora_B has shape ", shape_of(lora_B),
                  ", wanted [", rows, ", R]");
  STD_TORCH_CHECK(lora_A.size(0) == lora_B.size(1), kOp, ": lora_B has rank ", lora_B.size(1), ", lora_A has rank ",
                  lora_A.size(0));
  STD_TORCH_CHECK(lora_A.size(0) >= 1 && lora_A.size(0) <= INT32_MAX / 2, kOp, ": lora_A has rank ", lora_A.size(0),
                  ", wanted at least 1");
  if (row_scale.has_value()) {
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == rows, kOp, ": row_scale has shape ",
                    shape_of(*row_scale), ", wanted [", rows, "]");
  }

  // The tensors a, b and g live until the launch, so that the memory of a converted copy is not reused before the
  // launch.
  const Tensor a = factor("lora_A", lora_A, weight), b = factor("lora_B", lora_B, weight);
  std::optional<Tensor> g;
  if (row_scale.has_value()) g = factor("row_scale", *row_scale, weight);
  const bool wide = dtype == ScalarType::Double;  // float64 results are for tests only, and are computed in float32
  const Tensor out = torch::stable::new_empty(weight, shape, wide ? ScalarType::Float : dtype);

  if (rows * columns > 0) {
    const Tensor dense = nf4 ? Tensor() : packed_dense(held, ScalarType::Float);
    const Launcher launcher(out);
    Nf4Merge merge{};
    if (nf4) {
      merge.weight = nf4_view(launcher, held);
    } else {
      merge.dense = launcher.in<float>(dense);
    }
    merge.rows = rows;
    merge.columns = columns;
    merge.ranks = static_cast<int>(a.size(0));
    merge.lora_A = launcher.in<float>(a);
    merge.lora_B = launcher.in<float>(b);
    merge.row_scale = launcher.in<float>(g);
    merge.scaling = static_cast<float>(scaling);
    if (dtype == ScalarType::BFloat16) {
      launch<bf16>(launcher, merge, out);
    } else if (dtype == ScalarType::Half) {
      launch<f16>(launcher, merge, out);
    } else {
      launch<float>(launcher, merge, out);
    }
  }
  return wide ? as_type(out, dtype) : out;
}

std::tuple<Tensor, Tensor, Tensor> nf4_merge_cuda(const Tensor& weight, const std::optional<Tensor>& absmax,
                                                  const std::optional<Tensor>& nested_absmax,
                                                  const std::optional<Tensor>& nested_code,
                                                  const std::optional<Tensor>& nested_offset, int64_t blocksize,
                                                  const std::vector<int64_t>& shape, const Tensor& lora_A,
                                                  const Tensor& lora_B, const std::optional<Tensor>& row_scale,
                                                  double scaling) {
  STD_TORCH_CHECK(format_number(blocksize) == 0, "nf4_merge: layout is ", blocksize,
                  ", wanted the block size of an NF4 weight");
  const Tensor merged = nf4_dequantize_merged_cuda(weight, absmax, nested_absmax, nested_code, nested_offset, blocksize,
                                                   shape, lora_A, lora_B, row_scale, scaling, ScalarType::Float);
  const auto [codes, scales] = nf4_quantized(merged, blocksize);
  const Tensor error = device_zeros(merged, {2}, ScalarType::Double);
  if (merged.numel() == 0) return {codes, scales, error};
  const DeviceWeight held =
      nf4_weight("nf4_merge", codes, {scales, std::nullopt, std::nullopt, std::nullopt}, blocksize, shape[0], shape[1]);
  const int64_t blocks = std::min<int64_t>(kErrorBlocks, ceil_div(merged.numel(), kErrorThreads));
  const Tensor partial = device_empty(merged, {blocks, 2}, ScalarType::Float);
  const Launcher launcher(merged);
  float* sums = launcher.scratch<float>(partial);
  launcher(nf4_merge_error_kernel, blocks, kErrorThreads, nf4_view(launcher, held), launcher.in<float>(merged), sums);
  launcher(nf4_merge_error_sum_kernel, 1, 2, sums, blocks, launcher.out<double>(error));
  return {codes, scales, error};
}

PEFT_EXT_CUDA_LIBRARY(m) {
  m.impl("nf4_dequantize_merged", PEFT_EXT_CUDA_BOX(&nf4_dequantize_merged_cuda));
  m.impl("nf4_merge", PEFT_EXT_CUDA_BOX(&nf4_merge_cuda));
}

}  // namespace
}  // namespace peft_ext
