// All code between this header and target_end.h is compiled for Armv8.2-A with bfloat16 instructions. Include this
// header before <arm_neon.h> and before other headers that contain code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif
