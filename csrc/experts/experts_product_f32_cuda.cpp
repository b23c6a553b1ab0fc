// The instances of the experts' launch functions for float32.
#include "experts/cuda/product_launch.cuh"

template void peft_ext::launch_experts_product<float>(const Launcher&, const ExpertsProduct&, const ProductVariant&);
template void peft_ext::launch_experts_onto<float>(const Launcher&, const ExpertsProduct&, bool, int64_t);
template void peft_ext::launch_experts_norm<float>(const Launcher&, const StackNorm&, bool, bool, int64_t);
template void peft_ext::launch_scale_runs<float>(const Launcher&, const ScaleRuns&, bool, int64_t);
