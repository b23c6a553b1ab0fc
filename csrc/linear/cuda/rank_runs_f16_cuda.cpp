// The instances of launch_rank_runs for float16.
#include "linear/cuda/rank_pass_launch.cuh"

template void peft_ext::launch_rank_runs<peft_ext::f16>(const Launcher&, const Grid&, const RankPass&,
                                                        const RankVariant&);
