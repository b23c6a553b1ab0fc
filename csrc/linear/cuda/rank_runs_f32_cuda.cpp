// The instances of launch_rank_runs for float32.
#include "linear/cuda/rank_pass_launch.cuh"

template void peft_ext::launch_rank_runs<float>(const Launcher&, const Grid&, const RankPass&, const RankVariant&);
