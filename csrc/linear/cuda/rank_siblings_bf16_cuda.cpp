// The instances of launch_siblings for bfloat16.
#include "linear/cuda/rank_siblings_launch.cuh"

template void peft_ext::launch_siblings<peft_ext::bf16>(const Launcher&, const Grid&, int, const SiblingsPass&,
                                                        const SiblingVariant&);
