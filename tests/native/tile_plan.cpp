// Tests csrc/linear/cpu/tiles/plan.h by enumeration: each plan covers every tile once, and keeps the cost of the
// busiest part within the bound that the header states. The program has three uses:
//
//   tile_plan check THREADS STRIPS
//       tests all of 1..THREADS threads and 1..STRIPS strips of 16 tokens, with every layer below; if STRIPS is `some`,
//       tests some of 1..THREADS threads and some of 1..1024 strips
//   tile_plan cost THREADS TOKENS N K DECODE
//       prints "parts blocks whole_panels share decoded": share is the work of the busiest part divided by the mean of
//       all threads, decoded is the number of decoded panels divided by the number of panels
//   tile_plan columns THREADS TOKENS K R
//       prints the number of columns in a part of the pass for dA with dropout (linear/cpu/pass_plan.h)
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "linear/cpu/pass_plan.h"
#include "linear/cpu/tiles/plan.h"

namespace {

using peft_ext::depth_part;
using peft_ext::panels_together;
using peft_ext::plan_tiles;
using peft_ext::PlanRange;
using peft_ext::TilePlan;

struct Layer {
  int64_t out, in;
};

// The linear layers of ten families: SmolLM2 135M, 360M and 1.7B; Llama 3.2 1B, 3.1 8B and 70B; Qwen2.5 0.5B and 7B;
// Gemma 2 2B; Mistral 7B; Phi-3 mini; GPT-2; BERT base; T5 base; Falcon 7B; and sizes that no model has.
constexpr Layer kLayers[] = {
    {576, 576},    {192, 576},     {1536, 576},  {576, 1536},  {960, 960},    {320, 960},    {2560, 960},
    {960, 2560},   {2048, 2048},   {8192, 2048}, {2048, 8192}, {512, 2048},   {4096, 4096},  {1024, 4096},
    {14336, 4096}, {4096, 14336},  {8192, 8192}, {1024, 8192}, {28672, 8192}, {8192, 28672}, {896, 896},
    {128, 896},    {4864, 896},    {896, 4864},  {3584, 3584}, {512, 3584},   {18944, 3584}, {3584, 18944},
    {2048, 2304},  {1024, 2304},   {9216, 2304}, {2304, 9216}, {3072, 3072},  {9216, 3072},  {16384, 3072},
    {3072, 8192},  {2304, 768},    {768, 768},   {3072, 768},  {768, 3072},   {4672, 4544},  {18176, 4544},
    {4544, 18176}, {128256, 4096}, {49152, 576}, {1, 1},       {63, 65},      {65, 31},      {4097, 1},
};

struct Summary {
  int64_t plans = 0, broken = 0;
  // worst idle share of plans with kPlanUnits units per thread, and of all other plans
  double worst_many = 0.0, worst_few = 0.0;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the cost of a part of a block, in units of a product of one strip.
int64_t part_cost(const TilePlan& plan, int64_t part, int64_t block, int64_t decode, int64_t* panels) {
  const int64_t begin = plan.first_unit(part, block), end = plan.first_unit(part + 1, block);
  const int64_t of_panel = plan.first_step(block + 1) - plan.first_step(block);
  if (end <= begin) return 0;
  const int64_t touched = (end - 1) / of_panel - begin / of_panel + 1;
  *panels += touched;
  return (end - begin) * plan.step + touched * decode;
}

void check(const TilePlan& plan, int64_t threads, int64_t decode, Summary* summary) {
  ++summary->plans;
  const auto expect = [&](bool holds, const char* what) {
    if (holds) return;
    if (++summary->broken <= 20)
      printf("broken: %s: rows %lld strips %lld step %lld threads %lld decode %lld\n", what,
             static_cast<long long>(plan.rows), static_cast<long long>(plan.strips), static_cast<long long>(plan.step),
             static_cast<long long>(threads), static_cast<long long>(decode));
  };
  expect(plan.parts >= 1 && plan.parts <= threads, "parts");
  expect(plan.blocks >= 1 && plan.first_step(0) == 0 && plan.first_step(plan.blocks) == plan.steps, "blocks");
  double mean_total = 0.0, most_total = 0.0;
  int64_t fewest_units = INT64_MAX;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t of_panel = plan.first_step(block + 1) - plan.first_step(block), units = of_panel * plan.panels;
    expect(of_panel >= 1, "an empty block");
    fewest_units = std::min(fewest_units, units);
    int64_t most = 0, panels = 0, at = 0;
    for (int64_t part = 0; part < plan.parts; ++part) {
      expect(plan.first_unit(part, block) == at && plan.first_unit(part + 1, block) >= at, "ranges that follow");
      at = plan.first_unit(part + 1, block);
      most = std::max(most, part_cost(plan, part, block, decode, &panels));
    }
    expect(at == units, "all units");
    const double mean = static_cast<double>(units * plan.step + plan.panels * decode) / static_cast<double>(threads);
    // With fewer units than threads, the busiest thread has one unit.
    expect(static_cast<double>(most) <= mean + static_cast<double>(plan.step + 2 * decode), "the bound");
    mean_total += mean;
    most_total += static_cast<double>(most);
  }
  const double idle = 1.0 - mean_total / most_total;
  double& worst = fewest_units >= threads * peft_ext::kPlanUnits ? summary->worst_many : summary->worst_few;
  worst = std::max(worst, idle);
}

// Returns whether the ranges of the plan are valid, and every strip of every panel is in exactly one range; the
// function marks each strip.
bool paints(const TilePlan& plan) {
  std::vector<uint8_t> seen(static_cast<size_t>(plan.panels * plan.strips));
  bool whole = true;
  for (int64_t part = 0; part < plan.parts; ++part)
    plan.each(part, [&](const PlanRange& of) {
      whole = whole && of.row % peft_ext::kPlanRows == 0 && of.row < of.end && of.end <= plan.rows &&
              of.end - of.row <= plan.together * peft_ext::kPlanRows && of.first % plan.step == 0 &&
              of.first < of.last && of.last <= plan.strips && of.last - of.first <= plan.strips_together();
      whole = whole && (of.end == plan.rows || (of.end - of.row) % peft_ext::kPlanRows == 0);
      if (!whole) return;
      for (int64_t row = of.row; row < of.end; row += peft_ext::kPlanRows)
        for (int64_t strip = of.first; strip < of.last; ++strip)
          ++seen[static_cast<size_t>(row / peft_ext::kPlanRows * plan.strips + strip)];
    });
  return whole && std::all_of(seen.begin(), seen.end(), [](uint8_t count) { return count == 1; });
}

std::vector<int64_t> choice(int64_t most, int64_t all_to) {
  std::vector<int64_t> values;
  for (int64_t i = 1; i <= most; i += i < all_to ? 1 : 1 + i / 9) values.push_back(i);
  for (int64_t i = all_to; i <= most; i *= 2)
    for (int64_t near : {i - 1, i, i + 1})
      if (near <= most) values.push_back(near);
  values.push_back(most);
  return values;
}

std::vector<int64_t> all(int64_t most) {
  std::vector<int64_t> values;
  for (int64_t i = 1; i <= most; ++i) values.push_back(i);
  return values;
}

// Checks the cut of the depth: a depth is one part up to the cut's bound, and has several parts above the bound. If
// there are several parts, each part has at most the cut's number of elements and begins at a multiple of 8 tiles. The
// panels that are decoded together take at most 512 KiB.
void check_depths(const peft_ext::DepthCut& how, Summary* summary) {
  for (int64_t tiles = 1; tiles <= 8192; ++tiles) {
    const int64_t part = depth_part(how, tiles), together = panels_together(how, part);
    const bool whole = part == tiles && tiles <= how.whole / 32;
    const bool cut = part < tiles && tiles > how.whole / 32 && part % 8 == 0 && part <= how.part / 32;
    const bool fits = together >= 1 && together * peft_ext::kPlanRows * part * 64 <= 512 << 10;
    ++summary->plans;
    if ((whole || cut) && fits) continue;
    if (++summary->broken <= 20) printf("broken: a part of the depth: tiles %lld\n", static_cast<long long>(tiles));
  }
}

// Checks the plan of the passes: the cost of the busiest thread is at least a fair share and at most the whole work; a
// single thread does not split the passes; and the number of kept sums is bounded.
void check_passes(int64_t most_threads, Summary* summary) {
  const auto expect = [&](bool holds, const char* what, int64_t tokens, int64_t columns, int64_t rank,
                          int64_t threads) {
    if (holds) return;
    if (++summary->broken <= 20)
      printf("broken: %s: tokens %lld columns %lld rank %lld threads %lld\n", what, static_cast<long long>(tokens),
             static_cast<long long>(columns), static_cast<long long>(rank), static_cast<long long>(threads));
  };
  for (const Layer& layer : kLayers)
    for (const int64_t rank : {int64_t{16}, int64_t{64}, int64_t{256}, int64_t{512}})
      for (const int64_t tokens : choice(8192, 130))
        for (const int64_t threads : choice(most_threads, 9)) {
          const int64_t columns = layer.in, all = tokens * columns * rank;
          const auto fair = [&](int64_t cost) { return cost <= all && cost * threads >= all; };
          ++summary->plans;
          expect(fair(peft_ext::row_pass_cost(tokens, columns, rank, threads)), "rows", tokens, columns, rank, threads);
          expect(fair(peft_ext::outer_pass_cost(tokens, columns, rank, threads)), "sums", tokens, columns, rank,
                 threads);
          expect(fair(peft_ext::row_and_outer_pass_cost(tokens, columns, rank, threads) / 2), "both", tokens, columns,
                 rank, threads);
          expect(threads > 1 || !peft_ext::passes_apart(tokens, columns, rank, threads), "one thread", tokens, columns,
                 rank, threads);
          const int64_t kept = peft_ext::chunks_together(tokens, columns, rank) * columns * rank;
          expect(kept <= std::max(peft_ext::kMostSums, columns * rank), "kept sums", tokens, columns, rank, threads);
        }
}

int run_check(int64_t most_threads, const char* strips_argument) {
  const bool some = strcmp(strips_argument, "some") == 0;
  const std::vector<int64_t> threads = some ? choice(most_threads, 33) : all(most_threads);
  const std::vector<int64_t> strips = some ? choice(1024, 40) : all(atoll(strips_argument));
  Summary summary;
  int64_t painted = 0;
  for (const Layer& layer : kLayers)
    for (const bool backward : {false, true})
      for (const int64_t step : {int64_t{2}, int64_t{32}})
        for (const int64_t decode : {int64_t{1}, int64_t{6}}) {
          const int64_t rows = backward ? layer.in : layer.out, depth = backward ? layer.out : layer.in;
          const peft_ext::DepthCut& cut = backward ? peft_ext::kBackwardCut : peft_ext::kForwardCut;
          const int64_t together = panels_together(cut, depth_part(cut, ceil_div(depth, 32)));
          for (const int64_t strip : strips)
            for (const int64_t count : threads) {
              const TilePlan plan = plan_tiles(rows, depth, strip * 16, step, decode, count, together);
              check(plan, count, decode, &summary);
              const TilePlan ragged = plan_tiles(rows, depth, strip * 16 - 15, step, decode, count);
              if (ragged.strips != plan.strips || ragged.parts != plan.parts || ragged.blocks != plan.blocks)
                ++summary.broken, printf("broken: a ragged strip changes the plan\n");
              if (summary.plans % 97 != 0 || plan.panels * plan.strips > 200000) continue;
              ++painted;
              if (!paints(plan)) ++summary.broken, printf("broken: tiles not covered once\n");
            }
        }
  check_depths(peft_ext::kForwardCut, &summary);
  check_depths(peft_ext::kBackwardCut, &summary);
  check_passes(most_threads, &summary);
  for (const int64_t rows : {int64_t{0}, int64_t{64}})
    if (plan_tiles(rows, 64, rows == 0 ? 64 : 0, 2, 1, 8).parts != 0)
      ++summary.broken, printf("broken: nothing to do\n");
  printf(
      "%lld plans, %lld painted, %lld broken; idle at most %.3f with %lld units a thread and more, %.3f with fewer\n",
      static_cast<long long>(summary.plans), static_cast<long long>(painted), static_cast<long long>(summary.broken),
      summary.worst_many, static_cast<long long>(peft_ext::kPlanUnits), summary.worst_few);
  return summary.broken == 0 ? 0 : 1;
}

int run_cost(char** argv) {
  const int64_t threads = atoll(argv[0]), tokens = atoll(argv[1]), rows = atoll(argv[2]), depth = atoll(argv[3]);
  const int64_t decode = atoll(argv[4]);
  const TilePlan plan = plan_tiles(rows, depth, tokens, 2, decode, threads);
  std::vector<int64_t> cost(static_cast<size_t>(plan.parts));
  int64_t decoded = 0;
  for (int64_t part = 0; part < plan.parts; ++part)
    for (int64_t block = 0; block < plan.blocks; ++block)
      cost[static_cast<size_t>(part)] += part_cost(plan, part, block, decode, &decoded);
  const double ideal =
      static_cast<double>(plan.panels * (ceil_div(tokens, 16) + decode * plan.blocks)) / static_cast<double>(threads);
  const auto busiest = static_cast<double>(*std::max_element(cost.begin(), cost.end()));
  printf("%lld %lld %d %.4f %.4f\n", static_cast<long long>(plan.parts), static_cast<long long>(plan.blocks),
         plan.whole_panels ? 1 : 0, busiest / ideal,
         static_cast<double>(decoded) / static_cast<double>(plan.panels * plan.blocks));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4 && strcmp(argv[1], "check") == 0) return run_check(atoll(argv[2]), argv[3]);
  if (argc == 7 && strcmp(argv[1], "cost") == 0) return run_cost(argv + 2);
  if (argc == 6 && strcmp(argv[1], "columns") == 0) {
    const auto width = peft_ext::block_columns(atoll(argv[3]), atoll(argv[4]), atoll(argv[5]), atoll(argv[2]), true);
    printf("%lld\n", static_cast<long long>(width));
    return 0;
  }
  fprintf(stderr,
          "usage: tile_plan check THREADS STRIPS|some | cost THREADS TOKENS N K DECODE | columns THREADS TOKENS K R\n");
  return 2;
}
