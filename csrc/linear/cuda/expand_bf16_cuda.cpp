// The instances of launch_expand and launch_expand_sum for bfloat16.
#include "linear/cuda/expand_launch.cuh"

template void peft_ext::launch_expand<peft_ext::bf16>(const Launcher&, const ExpandTerms&, bool);
template void peft_ext::launch_expand_sum<peft_ext::bf16>(const Launcher&, const ExpandSum&);
