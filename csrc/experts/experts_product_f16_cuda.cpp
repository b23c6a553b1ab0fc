// The instances of the experts' launch functions for float16.
#include "experts/cuda/product_launch.cuh"

template void peft_ext::launch_experts_product<peft_ext::f16>(const Launcher&, const ExpertsProduct&,
                                                              const ProductVariant&);
template void peft_ext::launch_experts_onto<peft_ext::f16>(const Launcher&, const ExpertsProduct&, bool, int64_t);
template void peft_ext::launch_experts_norm<peft_ext::f16>(const Launcher&, const StackNorm&, bool, bool, int64_t);
template void peft_ext::launch_scale_runs<peft_ext::f16>(const Launcher&, const ScaleRuns&, bool, int64_t);
