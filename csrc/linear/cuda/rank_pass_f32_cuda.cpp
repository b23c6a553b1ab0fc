// The instances of launch_rank_pass for float32.
#include "linear/cuda/rank_pass_launch.cuh"

template void peft_ext::launch_rank_pass<float>(const Launcher&, const Grid&, const RankPass&, const RankVariant&);
