// Defines the host functions of the rank passes of several layers of one input. The kernel is in rank_siblings.cuh. See
// passes.cuh.
#include "linear/cuda/passes.cuh"
#include "linear/cuda/rank_plan.cuh"
#include "linear/cuda/rank_siblings.cuh"

namespace peft_ext {

bool siblings_read(const Tensor& x) {
  return x.scalar_type() != ScalarType::Float && x.size(1) % kVector == 0 && x.size(1) < kMaxRankColumns &&
         aligned(x, 16);
}

std::vector<std::vector<size_t>> sibling_groups(const std::vector<int64_t>& kinds) {
  std::vector<std::vector<size_t>> groups;
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (kinds[i] < 0) continue;
    const int64_t rank = kinds[i] & UINT32_MAX;
    const size_t most = rank > 32 ? 1 : static_cast<size_t>(kMostSiblingWarps * 16 / rank);
    const auto found = std::find_if(groups.begin(), groups.end(), [&](const std::vector<size_t>& group) {
      return kinds[group[0]] == kinds[i] && group.size() < most;
    });
    found == groups.end() ? groups.push_back({i}) : found->push_back(i);
  }
  return groups;
}

SiblingSums siblings_pass(const Tensor& x, const std::vector<SiblingTerm>& layers, bool columns, bool masks) {
  Launcher launcher(x);
  const int64_t rank = layers[0].factor->terms.outer;
  SiblingsPass pass;
  pass.dense = launcher.in<void>(x);
  pass.rows = x.size(0);
  pass.columns = x.size(1);
  pass.padded_rows = round_up(pass.rows, kRankTile);
  pass.padded_columns = round_up(pass.columns, kRankTile);
  const int64_t row_tiles = pass.padded_rows / kRankTile, column_tiles = pass.padded_columns / kRankTile;
  // The pass is divided into thread blocks as a pass for one layer, so that a layer's sums have the same order with and
  // without siblings.
  const RankPlan plan = plan_rank_pass(columns ? RankWork::kColumns : RankWork::kRows, row_tiles, column_tiles);
  pass.tiles = columns ? plan.row_tiles : plan.column_tiles;
  pass.chunks = columns ? plan.row_chunks : plan.column_chunks;

  SiblingVariant variant{rank, layers[0].factor->terms.count, columns, false};
  SiblingSums found;
  for (size_t i = 0; i < layers.size(); ++i) {
    const SiblingTerm& layer = layers[i];
    SiblingPart& part = pass.parts[i];
    part.factor = read_terms(launcher, *layer.factor).data;
    part.dropout = device_dropout(launcher, *layer.adapter);
    const bool drops = layer.adapter->seed.has_value();
    variant.dropped = variant.dropped || drops;
    const int64_t padded = columns ? pass.padded_columns : pass.padded_rows;
    found.sums.push_back({device_empty(x, {pass.chunks, padded, rank}, ScalarType::Float), pass.chunks, padded,
                          columns ? pass.columns : pass.rows});
    part.sums = launcher.scratch<float>(found.sums.back().sums);
    found.kept.emplace_back();
    if (masks && drops) {
      found.kept.back() = device_empty(x, {row_tiles * column_tiles, kRankThreads}, ScalarType::Int);
      part.kept = static_cast<uint32_t*>(launcher.scratch<void>(*found.kept.back()));
    }
  }
  const int warps = static_cast<int>(layers.size() * rank / 16);
  const Grid grid((columns ? column_tiles : row_tiles) * pass.chunks);
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch_siblings<bf16>(launcher, grid, warps, pass, variant);
  } else {
    launch_siblings<f16>(launcher, grid, warps, pass, variant);
  }
  return found;
}

}  // namespace peft_ext
