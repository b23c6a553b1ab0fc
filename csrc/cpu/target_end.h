// Ends the region of code that a target_<isa>.h header began.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
