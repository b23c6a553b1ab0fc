// Linear layers with rows of their own on the CPU, each with LoRA or without: a mixture's experts that are modules of
// their own. The rows of one layer lie behind those of another, and each run of them (linear/cpu/runs.h) is a call of
// the adapted layer (linear/cpu/adapted_linear.h).
#include <string.h>

#include <vector>

#include "linear/cpu/adapted_linear.h"
#include "linear/cpu/layers.h"
#include "linear/cpu/runs.h"

namespace peft_ext {
namespace {

// The layers [N, K] and the rows of those that have some.
struct Listed {
  std::vector<Layer> layers;
  std::vector<Run> runs;
  int64_t out, in;
};

Listed listed(const char* op, const std::vector<int64_t>& rows, std::vector<Tensor> tensors,
              const std::vector<int64_t>& sizes, const std::vector<double>& numbers, int64_t all_rows) {
  for (Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": a layer's tensor is not on the CPU");
    if (tensor.numel() == 0) continue;
    std::vector<int64_t> shape, strides;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      shape.push_back(tensor.size(i));
      strides.push_back(tensor.stride(i));
    }
    tensor = part_of(tensor, 0, shape, strides);  // the operator's arguments keep the memory
  }
  Listed held{lora_layers(op, tensors, sizes, numbers), {}, 0, 0};
  STD_TORCH_CHECK(!held.layers.empty() && rows.size() == held.layers.size(), op, ": rows has ", rows.size(),
                  " entries, wanted one for each of ", held.layers.size(), " layers");
  held.out = held.layers[0].weight.out_features();
  held.in = held.layers[0].weight.in_features();
  int64_t begin = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const FrozenWeight& weight = held.layers[i].weight;
    STD_TORCH_CHECK(weight.out_features() == held.out && weight.in_features() == held.in, op, ": layer ", i, " is [",
                    weight.out_features(), ", ", weight.in_features(), "], wanted [", held.out, ", ", held.in,
                    "], as the first");
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] <= all_rows - begin, op, ": rows is ", rows[i], " at ", i, ", wanted 0 to ",
                    all_rows - begin);
    if (rows[i] > 0) held.runs.push_back({static_cast<int64_t>(i), begin, begin + rows[i]});
    begin += rows[i];
  }
  STD_TORCH_CHECK(begin == all_rows, op, ": rows sums to ", begin, ", wanted x's rows, ", all_rows);
  return held;
}

Tensor zeros_like(const Tensor& like) {
  const Tensor zeros = torch::stable::empty_like(like);
  memset(zeros.mutable_data_ptr(), 0, static_cast<size_t>(zeros.numel()) * zeros.element_size());
  return zeros;
}

std::vector<Tensor> lora_expert_linears_cpu(Tensor x, std::vector<int64_t> rows, std::vector<Tensor> tensors,
                                            std::vector<int64_t> sizes, std::vector<double> numbers) {
  constexpr const char* kOp = "lora_expert_linears";
  const Listed held = listed(kOp, rows, tensors, sizes, numbers, x.size(0));
  const Tensor held_x = checked_rows(kOp, "x", x, held.in);
  std::vector<Tensor> out{empty({held_x.size(0), held.out}, x.scalar_type())};
  for (size_t i = 0; i < held.layers.size(); ++i) {
    const Adapter& adapter = held.layers[i].adapter;
    out.push_back(adapter.low_rank() ? empty({rows[i], adapter.rank()}, ScalarType::Float) : none());
  }
  each_run(held.runs, [&](const Run& run) {
    const Layer& layer = held.layers[static_cast<size_t>(run.expert)];
    AdaptedForward room;
    room.y = rows_of_run(out[0], run);
    room.s = out[static_cast<size_t>(run.expert) + 1];
    room.z = none(x.scalar_type());
    adapted_forward(kOp, rows_of_run(held_x, run), layer.weight, layer.bias, layer.adapter, false, false, &room);
  });
  return out;
}

std::vector<Tensor> lora_expert_linears_backward_cpu(Tensor grad, Tensor x, std::vector<int64_t> rows,
                                                     std::vector<Tensor> tensors, std::vector<int64_t> sizes,
                                                     std::vector<double> numbers, std::vector<Tensor> s,
                                                     bool needs_grad_x) {
  constexpr const char* kOp = "lora_expert_linears_backward";
  const Listed held = listed(kOp, rows, tensors, sizes, numbers, x.size(0));
  const Tensor held_x = checked_rows(kOp, "x", x, held.in);
  const Tensor held_grad = checked_rows(kOp, "grad", grad, held.out, &held_x);
  STD_TORCH_CHECK(s.size() == held.layers.size(), kOp, ": s has ", s.size(), " entries, wanted ", held.layers.size());
  const Tensor grad_x = needs_grad_x ? empty({held_x.size(0), held.in}, x.scalar_type()) : none(x.scalar_type());
  std::vector<AdaptedBackward> found(held.layers.size());
  each_run(held.runs, [&](const Run& run) {
    const auto at = static_cast<size_t>(run.expert);
    const Layer& layer = held.layers[at];
    std::optional<Tensor> own_s, room;
    if (layer.adapter.low_rank()) own_s = s[at];
    if (needs_grad_x) room = rows_of_run(grad_x, run);
    found[at] = adapted_backward(kOp, rows_of_run(held_grad, run), rows_of_run(held_x, run), layer.weight,
                                 layer.adapter, own_s, needs_grad_x, room);
  });
  std::vector<Tensor> out{grad_x};
  for (size_t i = 0; i < held.layers.size(); ++i) {
    const Adapter& adapter = held.layers[i].adapter;
    const std::optional<Tensor>& scale = adapter.rank_scale;
    if (!adapter.low_rank()) {
      out.insert(out.end(), 3, none());
    } else if (rows[i] == 0) {
      out.push_back(zeros_like(*adapter.lora_A));
      out.push_back(zeros_like(*adapter.lora_B));
      out.push_back(scale.has_value() ? zeros_like(*scale) : none());
    } else {
      out.push_back(found[i].grad_A);
      out.push_back(found[i].grad_B);
      out.push_back(scale.has_value() ? as_type(found[i].grad_rank_scale, scale->scalar_type())
                                      : found[i].grad_rank_scale);
    }
  }
  return out;
}

}  // namespace
}  // namespace peft_ext

STABLE_TORCH_LIBRARY_IMPL(peft_ext, CPU, m) {
  m.impl("lora_expert_linears", TORCH_BOX(&peft_ext::lora_expert_linears_cpu));
  m.impl("lora_expert_linears_backward", TORCH_BOX(&peft_ext::lora_expert_linears_backward_cpu));
}
