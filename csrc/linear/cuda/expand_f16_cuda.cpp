// The instances of launch_expand and launch_expand_sum for float16.
#include "linear/cuda/expand_launch.cuh"

template void peft_ext::launch_expand<peft_ext::f16>(const Launcher&, const ExpandTerms&, bool);
template void peft_ext::launch_expand_sum<peft_ext::f16>(const Launcher&, const ExpandSum&);
