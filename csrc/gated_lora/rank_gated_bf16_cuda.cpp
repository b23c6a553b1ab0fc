// The instances of launch_gated for bfloat16.
#include "gated_lora/cuda/rank_gated_launch.cuh"

template void peft_ext::launch_gated<peft_ext::bf16>(const Launcher&, const Grid&, const GatedPass&,
                                                     const GatedVariant&);
