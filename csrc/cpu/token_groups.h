// Splits tokens into groups of 8, 4, 3, 2 and 1 tokens. The size of a group is a template argument.
#pragma once

#include <stdint.h>

namespace peft_ext {
namespace {

template <int kTokens>
struct TokenGroup {
  static constexpr int kCount = kTokens;
};

// Calls run(TokenGroup<n>(), first token) for each group.
template <typename Run>
inline void for_token_groups(int64_t tokens, const Run& run) {
  for (int64_t t = 0; t < tokens;) {
    const int64_t left = tokens - t;
    if (left >= 8) {
      run(TokenGroup<8>(), t);
      t += 8;
    } else if (left >= 4) {
      run(TokenGroup<4>(), t);
      t += 4;
    } else if (left == 3) {
      run(TokenGroup<3>(), t);
      t += 3;
    } else if (left == 2) {
      run(TokenGroup<2>(), t);
      t += 2;
    } else {
      run(TokenGroup<1>(), t);
      t += 1;
    }
  }
}

}  // namespace
}  // namespace peft_ext
