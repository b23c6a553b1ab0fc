// All code between this header and target_end.h is compiled for AVX2 + FMA + F16C, independently of the command line.
// Include this header before <immintrin.h> and before other headers that contain code.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
