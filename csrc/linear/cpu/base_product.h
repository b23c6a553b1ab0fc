// Computes a base product as a float32 matrix, for most calls that neither the tile kernels nor forward_few_tokens
// computes: by PyTorch's matrix product in x's dtype or in float32, or, in the forward of few tokens and a packed
// weight, by the kernels of packed/cpu/skinny.h.
#pragma once

#include "linear/cpu/passes.h"

namespace peft_ext {

// Returns whether PyTorch's product runs in x's own dtype `type` (if false, in float32). plain: true if the product is
// Y or dX itself, which is rounded at once; false if the product is an intermediate result that is scaled later. On
// x86-64, products of 16-bit types need special instructions to be fast, and products of float32 do not.
bool multiplies_in(ScalarType type, bool plain);

// product_forward returns x [T, K] Wᵀ in float32. x is float32 or has the dtype `type`; `type` is W's dtype, or the
// dtype to which a packed W is decoded.
Tensor product_forward(const char* op, const Tensor& x, const FrozenWeight& weight, ScalarType type);

// product_backward returns g W in float32. g [T, N] is a gradient such as dY, in the dtype `type` or in float32.
Tensor product_backward(const char* op, const Tensor& g, const FrozenWeight& weight, ScalarType type);

// Returns whether so few elements are dropped that a product with only these elements is faster than a product with all
// of W.
bool drops_few(const Dropout& dropout);

// PEFT's DoRA with dropout on the base needs two base products. products_apart returns whether the second product uses
// only the dropped elements. products_apart returns true only if dropout drops few elements, products run in float32,
// skinny_product does not accept the call, and there are enough tokens to pay for transposing W.
bool products_apart(const FrozenWeight& weight, ScalarType type, int64_t tokens, const Dropout& dropout);

// Adds (x - mask ∘ x) Wᵀ to out [T, N] float32. x is contiguous.
void add_dropped_product(const char* op, const Tensor& x, const KeepBits& keep, const FrozenWeight& weight,
                         const Tensor& out);
// Sets the elements of out [T, K] that dropout drops to the values of dY W at these positions. grad is dY, contiguous.
void put_dropped_dots(const char* op, const Tensor& grad, const KeepBits& keep, const FrozenWeight& weight,
                      const Tensor& out);

}  // namespace peft_ext
