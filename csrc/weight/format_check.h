// Checks the sizes of a packed weight in one of the formats of weight/formats/list.h, on the CPU and on CUDA. NF4 is
// not one of the formats of weight/formats/list.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "common/tensor_calls.h"
#include "weight/formats/list.h"
#include "weight/packed_view.h"

namespace peft_ext {

namespace {

// The functions of a format that check a weight's sizes, see weight/formats/list.h.
struct FormatSizes {
  const char* name;
  const char* (*refused)(const PackedView& w);
  int64_t (*part_bytes)(const PackedView& w, int part);
};

inline FormatSizes format_sizes(int64_t number) {
  switch (number) {
#define FORMAT(number, Format) \
  case number:                 \
    return {#Format, Format::refused, Format::part_bytes};
    PEFT_EXT_FORMATS(FORMAT)
#undef FORMAT
    default:
      return {nullptr, nullptr, nullptr};
  }
}

// Checks the parts of `count` weights [rows, columns]; a tensor holds one part of every weight, one weight after the
// other. Each error message names the operator op. part_of(part) returns std::optional<Tensor>, and fits(tensor)
// returns whether the tensor is on the device that the operator wants, which the text `device` names.
template <typename PartOf, typename Fits>
inline void check_format(const char* op, int64_t layout, int64_t count, int64_t rows, int64_t columns,
                         const char* device, PartOf part_of, Fits fits) {
  const FormatSizes format = format_sizes(format_number(layout));
  STD_TORCH_CHECK(format.name != nullptr, op, ": layout is ", layout, ", which names no format");
  PackedView view{};
  view.rows = rows;
  view.columns = columns;
  view.group = format_group(layout);
  view.option = format_option(layout);
  for (int part = 0; part < kWeightParts; ++part)
    if (const std::optional<torch::stable::Tensor> tensor = part_of(part))
      view.part[part] = part_address(tensor->const_data_ptr());
  if (const char* wanted = format.refused(view))
    STD_TORCH_CHECK(false, op, ": ", format.name, " weight [", rows, ", ", columns, "] has group ", view.group,
                    " and option ", view.option, ", wanted ", wanted);
  for (int part = 0; part < kWeightParts; ++part) {
    const std::optional<torch::stable::Tensor> tensor = part_of(part);
    const int64_t bytes = format.part_bytes(view, part);  // a number below 0: the part may be absent
    if (!tensor.has_value()) {
      STD_TORCH_CHECK(bytes <= 0, op, ": part ", part, " of a ", format.name, " weight is None, wanted ", bytes,
                      " bytes");
      continue;
    }
    const int64_t came = tensor->numel() * static_cast<int64_t>(tensor->element_size()),
                  wanted = checked_product(bytes < 0 ? -bytes : bytes, count);
    STD_TORCH_CHECK(came == wanted && fits(*tensor), op, ": part ", part, " of a ", format.name, " weight [", rows,
                    ", ", columns, "] has ", came, " bytes, wanted ", wanted, " on ", device);
  }
}

}  // namespace
}  // namespace peft_ext
