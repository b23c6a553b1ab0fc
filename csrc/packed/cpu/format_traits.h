// Tells which of the optional members in weight/formats/list.h a format has. Include this file after the target pragma.
#pragma once

namespace peft_ext {
namespace {

// Tells whether a format has the members of 4-bit codes, see weight/formats/list.h.
template <typename F, typename = void>
struct HasNibbles {
  static constexpr bool kValue = false;
};
template <typename F>
struct HasNibbles<F, decltype(static_cast<void>(F::kNibbles))> {
  static constexpr bool kValue = true;
};

// Tells whether a format has codes of FP8 (e4m3).
template <typename F, typename = void>
struct HasE4m3 {
  static constexpr bool kValue = false;
};
template <typename F>
struct HasE4m3<F, decltype(static_cast<void>(F::kE4m3))> {
  static constexpr bool kValue = true;
};

// Tells whether a format has the function decode_rows, which decodes several rows together.
template <typename F, typename = void>
struct HasRowBlocks {
  static constexpr bool kValue = false;
};
template <typename F>
struct HasRowBlocks<F, decltype(static_cast<void>(F::kRowBlocks))> {
  static constexpr bool kValue = true;
};

// Tells whether part 0, the first tensor of a weight in the format, holds the codes row by row. For a format
// without the member kRowMajor, the answer is no if the format has decode_rows (such a format stores W transposed), and
// yes otherwise.
template <typename F, typename = void>
struct IsRowMajor {
  static constexpr bool kValue = !HasRowBlocks<F>::kValue;
};
template <typename F>
struct IsRowMajor<F, decltype(static_cast<void>(F::kRowMajor))> {
  static constexpr bool kValue = F::kRowMajor;
};

}  // namespace
}  // namespace peft_ext
