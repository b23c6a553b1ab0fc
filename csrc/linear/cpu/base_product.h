// The base product where the package has no kernel of its own for it: PyTorch's, in x's type or in float32.
#pragma once

#include "linear/cpu/passes.h"

namespace peft_ext {

// Whether PyTorch's product runs in x's own type, where its result is rounded (plain: Y or dX itself) or goes on to be
// scaled. On x86-64 its products of 16-bit types need instructions for them; float32's do not.
bool multiplies_in(ScalarType type, bool plain);

// x [T, K] Wᵀ in float32; x is of W's type, or of float32.
Tensor product_forward(const char* op, const Tensor& x, const FrozenWeight& weight, ScalarType type);

// g [T, N] W in float32; g is of W's type or of float32.
Tensor product_backward(const char* op, const Tensor& g, const FrozenWeight& weight, ScalarType type);

// Whether so few elements are dropped that a product with them alone costs less than one with all of W.
bool drops_few(const Dropout& dropout);

// Whether the second product of a base that is dropped as well is that: of products that are not rounded before they
// are returned, and of so many tokens that W is turned for less.
bool products_apart(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Dropout& dropout);

// out [T, N] float32 += (x - mask ∘ x) Wᵀ, and out [T, K] = dY W where the mask has no bit. x and dY are contiguous.
void add_dropped_product(const char* op, const Tensor& x, const KeepBits& keep, const FrozenWeight& weight,
                         const Tensor& out);
void put_dropped_dots(const char* op, const Tensor& grad, const KeepBits& keep, const FrozenWeight& weight,
                      const Tensor& out);

}  // namespace peft_ext
