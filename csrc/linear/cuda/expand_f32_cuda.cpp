// The instances of launch_expand and launch_expand_sum for float32.
#include "linear/cuda/expand_launch.cuh"

template void peft_ext::launch_expand<float>(const Launcher&, const ExpandTerms&, bool);
template void peft_ext::launch_expand_sum<float>(const Launcher&, const ExpandSum&);
