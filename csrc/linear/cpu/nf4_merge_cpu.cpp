// peft_ext::nf4_merge on the CPU: W' = g ∘ (W + s B A), quantized to NF4 again, in one pass over W.
//
// A thread merges whole rows of W with about 64 K elements at a time. The rows begin, and except at the end of W also
// end, at a boundary of NF4 blocks; if the fewest such rows have more than 64 K elements, a thread merges these rows at
// a time. The thread decodes the rows, adds the low-rank term, scales and quantizes the rows, and decodes the new codes
// to compare the decoded rows with the rows before quantization. The rows that a thread merges stay in L2, so that only
// codes and scales of W are read from and written to memory. nf4_merge computes W' in float32, as nf4_dequantize_merged
// does. The result `error` has two double sums: of the squared rounding errors, and of the squared merged weights. The
// order of these sums depends only on the sizes.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "common/registration.h"
#include "cpu/operator_call.h"
#include "linear/cpu/passes.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "packed/cpu/decode.h"

namespace peft_ext {
namespace {

constexpr int64_t kMergeElements = 64 * 1024;

std::tuple<Tensor, Tensor, Tensor> nf4_merge_cpu(Tensor weight, std::optional<Tensor> absmax,
                                                 std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_code,
                                                 std::optional<Tensor> nested_offset, int64_t blocksize,
                                                 std::vector<int64_t> shape, Tensor lora_A, Tensor lora_B,
                                                 std::optional<Tensor> row_scale, double scaling) {
  constexpr const char* kOp = "nf4_merge";
  STD_TORCH_CHECK(absmax.has_value(), kOp, ": absmax is None, wanted the scales of an NF4 weight");
  STD_TORCH_CHECK(shape.size() == 2, kOp, ": shape has ", shape.size(), " dimensions, wanted [N, K]");
  const FrozenWeight held =
      checked_weight(kOp, weight, {absmax, nested_absmax, nested_code, nested_offset}, blocksize, shape);
  STD_TORCH_CHECK(held.is_nf4(), kOp, ": layout is ", blocksize, ", wanted the block size of an NF4 weight");
  const int64_t n = shape[0], k = shape[1], rank = lora_A.dim() == 2 ? lora_A.size(0) : 0;
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == k && rank > 0, kOp, ": lora_A has ", lora_A.numel(),
                  " elements, wanted [R, ", k, "]");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(0) == n && lora_B.size(1) == rank, kOp, ": lora_B is not [", n, ", ",
                  rank, "]");
  const int64_t count = n * k;
  Expand add;
  add.dtype = DType::kF32;
  add.columns = k;
  add.rank = rank;
  add.stride = round_up(k, kColumnStep);
  const Tensor right = packed(kOp, "lora_A", lora_A, nullptr, nullptr, false, rank, add.stride);
  const std::vector<float> rho(static_cast<size_t>(rank), static_cast<float>(scaling));
  const Tensor left = packed(kOp, "lora_B", lora_B, nullptr, rho.data(), false, n, rank);
  add.right = right.const_data_ptr<float>();
  Tensor g;
  if (row_scale.has_value()) g = float_vector(kOp, "row_scale", *row_scale, n);

  Tensor codes = empty({ceil_div(count, 2), 1}, ScalarType::Byte);
  Tensor scales = empty({ceil_div(count, blocksize)}, ScalarType::Float);
  Tensor error = empty({2}, ScalarType::Double);
  auto* totals = static_cast<double*>(error.mutable_data_ptr());
  totals[0] = totals[1] = 0.0;
  if (count == 0) return {codes, scales, error};

  // `step` is the smallest number of rows of W that fill whole NF4 blocks. The number of rows in a chunk is the largest
  // multiple of `step` rows with at most kMergeElements elements, but at least `step`.
  const int64_t step = blocksize / std::gcd(k, blocksize);
  const int64_t rows = step * std::max<int64_t>(1, kMergeElements / (step * k)), chunks = ceil_div(n, rows);
  std::vector<double> sums(static_cast<size_t>(2 * chunks));
  const PassKernels& low_rank = pass_kernels();
  const Nf4Kernels& nf4 = nf4_kernels();
  uint8_t* to_codes = codes.mutable_data_ptr<uint8_t>();
  float* to_scales = scales.mutable_data_ptr<float>();
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * rows, last = min_i64(first + rows, n);
      const int64_t flat = first * k, size = (last - first) * k, blocks = ceil_div(size, blocksize);
      const auto bytes = static_cast<size_t>((size + 2 * blocksize) * 4);
      auto* w = static_cast<float*>(scratch(Scratch::kRows, bytes));
      dequantize_range(held, flat, flat + size, DType::kF32, w);
      Expand work = add;
      work.y = w;
      work.before = w;
      work.left = left.const_data_ptr<float>() + first * rank;
      low_rank.expand(work, 0, last - first, 0, k);
      if (row_scale.has_value())
        for (int64_t i = first; i < last; ++i)
          for (int64_t j = 0; j < k; ++j) w[(i - first) * k + j] *= g.const_data_ptr<float>()[i];
      nf4.quantize(w, DType::kF32, size, blocksize, 0, blocks, to_codes + flat / 2, to_scales + flat / blocksize);
      auto* back = static_cast<float*>(scratch(Scratch::kPanel, bytes));
      nf4.dequantize(to_codes + flat / 2, to_scales + flat / blocksize, size, blocksize, 0, blocks, back, DType::kF32);
      double moved = 0.0, whole = 0.0;
      for (int64_t i = 0; i < size; ++i) {
        const double was = w[i], by = back[i] - was;
        moved += by * by;
        whole += was * was;
      }
      sums[static_cast<size_t>(2 * chunk)] = moved;
      sums[static_cast<size_t>(2 * chunk + 1)] = whole;
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int i = 0; i < 2; ++i) totals[i] += sums[static_cast<size_t>(2 * chunk + i)];
  return {codes, scales, error};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) { m.impl("nf4_merge", PEFT_EXT_CPU_BOX(&peft_ext::nf4_merge_cpu)); }
