// Defines the 16 NF4 values, which are those of bitsandbytes' get_4bit_type("nf4"), and the 15 thresholds between
// neighbouring values.
#pragma once

namespace peft_ext {
namespace {

constexpr float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The code of a value is the number of thresholds that are not greater than or equal to the value. A value that equals
// a threshold has the lower code, and a NaN has code 15.
constexpr float nf4_threshold(int i) { return (kNf4Code[i] + kNf4Code[i + 1]) / 2; }

constexpr float kSmallestAbsmax = 1e-38f;

}  // namespace
}  // namespace peft_ext
