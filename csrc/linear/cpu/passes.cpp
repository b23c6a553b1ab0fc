// Runs the passes of kernels.h over activations and over W on all threads. pass_plan.h decides how a pass is divided.
#include "linear/cpu/passes.h"

#include <algorithm>
#include <memory>

#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "linear/cpu/chunk_sums.h"
#include "packed/cpu/decode.h"

namespace peft_ext {

namespace {

// Cost of computing an element of Expand::y without the low-rank product, in multiplications; the low-rank product
// costs one multiplication per rank.
constexpr int64_t kExpandPasses = 8;
static_assert(kBlockColumns % kColumnStep == 0 && kColumnsTogether % kColumnStep == 0,
              "a part's first column is a multiple of kColumnStep");
static_assert(kTokenStep % kRowsTogether == 0 && kMaskColumns == kColumnsTogether);
// Number of rows of W that a pass over W reads, or decodes from a packed weight, at a time.
constexpr int64_t kRowChunk = 64;

// Returns W's rows [first, last) in `type`: a pointer into W, or rows decoded into the calling thread's scratch.
const void* weight_rows(const FrozenWeight& weight, const Tensor& dense, ScalarType type, int64_t first, int64_t last) {
  const int64_t k = weight.in_features(), width = type == ScalarType::Float ? 4 : 2;
  if (!weight.is_packed()) return static_cast<const char*>(dense.const_data_ptr()) + first * k * width;
  const size_t room = static_cast<size_t>(room_of_rows(weight, last - first) * width);
  return decode_rows(weight, first, last, dtype_of("nf4_dequantize", "dtype", type), scratch(Scratch::kRows, room));
}

RowPass weight_pass(const char* op, const FrozenWeight& weight, ScalarType type, int64_t rank) {
  RowPass pass;
  pass.dtype = dtype_of(op, "dtype", type);
  pass.columns = weight.in_features();
  pass.rank = rank;
  return pass;
}

}  // namespace

const PassKernels& pass_kernels() {
#if defined(__x86_64__)
  return select_kernels(&kPassKernelsScalar, &kPassKernelsAvx2, &kPassKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kPassKernelsScalar, &kPassKernelsNeon);
#else
  return kPassKernelsScalar;
#endif
}

RowPass make_row_pass(const Tensor& m, DType dtype, int64_t columns, int64_t rank, const Dropout& dropout) {
  RowPass pass;
  pass.m = m.const_data_ptr();
  pass.dtype = dtype;
  pass.columns = columns;
  pass.rank = rank;
  pass.dropout = dropout;
  return pass;
}

void run_row_passes(const std::vector<RowPass>& passes, int64_t tokens, const TokenWork& beside, int64_t beside_work) {
  // Number of steps of kTokenStep tokens after which `beside` is called: the rows of m of these tokens are still in L2
  // when `beside` reads the rows again.
  constexpr int64_t kTogether = 2;
  const PassKernels& isa = pass_kernels();
  int64_t multiplications = kTokenStep * beside_work;
  for (const RowPass& pass : passes) multiplications += kTokenStep * pass.columns * pass.rank;
  parallel_for(0, ceil_div(tokens, kTokenStep), pass_grain(multiplications), [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; step += kTogether) {
      const int64_t first = step * kTokenStep, last = min_i64(min_i64(step + kTogether, end) * kTokenStep, tokens);
      for (const RowPass& pass : passes) isa.row_pass(pass, first, last, 0, pass.columns);
      if (beside) beside(first, last);
    }
  });
}

void run_row_pass(const RowPass& pass, int64_t tokens) { run_row_passes({pass}, tokens, nullptr, 0); }

namespace {

// Sets the columns [first, last) of acc to zero. acc has `rank` rows, which are `stride` floats apart.
void clear_columns(float* acc, int64_t stride, int64_t rank, int64_t first, int64_t last) {
  for (int64_t r = 0; r < rank; ++r) std::fill_n(acc + r * stride + first, last - first, 0.0f);
}

}  // namespace

Tensor summed(LateSums* sums) {
  if (sums->count == 0) return sums->total;
  const int64_t size = sums->total.numel();
  const float* from = sums->held.const_data_ptr<float>() + sums->first * size;
  float* total = sums->total.mutable_data_ptr<float>();
  parallel_for(0, size, kPackGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < sums->count; ++c)
      for (int64_t i = begin; i < end; ++i) total[i] += from[c * size + i];
  });
  sums->count = 0;
  return sums->total;
}

namespace {

// Computes the sums leftᵀ · m of a pass for the columns [first, last): sums one chunk of tokens after the other, and
// adds the chunks' sums in order.
void sum_columns(const RowPass& pass, int64_t tokens, int64_t first, int64_t last, float* sums, float* totals) {
  const PassKernels& isa = pass_kernels();
  const int64_t chunk = chunk_tokens(tokens), rank = pass.rank;
  const auto room = static_cast<size_t>(min_i64(kColumnsTogether, last - first) * (rank + 1)) * sizeof(float);
  auto* own = static_cast<float*>(scratch(Scratch::kRows, room));
  for (int64_t from = first; from < last; from += kColumnsTogether) {
    const int64_t to = min_i64(from + kColumnsTogether, last), width = to - from;
    float* own_totals = own + width * rank;
    for (int64_t t = 0; t < tokens; t += chunk) {
      RowPass part = pass;
      part.acc = t == 0 ? sums : own - from;
      part.acc_stride = t == 0 ? pass.columns : width;
      clear_columns(part.acc, part.acc_stride, rank, from, to);
      if (totals != nullptr) {
        part.totals = t == 0 ? totals : own_totals - from;
        std::fill_n(part.totals + from, width, 0.0f);
      }
      isa.row_pass(part, t, min_i64(t + chunk, tokens), from, to);
      if (t == 0) continue;
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t i = 0; i < width; ++i) sums[r * pass.columns + from + i] += own[r * width + i];
      for (int64_t i = 0; totals != nullptr && i < width; ++i) totals[from + i] += own_totals[i];
    }
  }
}

// ChunkSums holds the sums leftᵀ · m of a pass that is divided by chunks of tokens. The first chunk's sums are computed
// in the total's memory. The sums of the other chunks are computed in buffers for up to chunks_together chunks; if
// there are more chunks, the buffers are added to the total and used again.
struct ChunkSums {
  int64_t chunk, chunks, together;
  LateSums sums, totals;  // totals [1, columns]: sums of m's columns, if wanted
  float *total, *held, *column_total = nullptr, *column_held = nullptr;

  ChunkSums(const RowPass& pass, int64_t tokens, bool of_columns) {
    chunk = chunk_tokens(tokens);
    chunks = ceil_div(tokens, chunk);
    together = chunks_together(tokens, pass.columns, pass.rank);
    const int64_t beside = chunks == 1 ? 0 : together;
    sums = {empty({pass.rank, pass.columns}, ScalarType::Float),
            empty({beside, pass.rank, pass.columns}, ScalarType::Float)};
    total = sums.total.mutable_data_ptr<float>();
    held = sums.held.mutable_data_ptr<float>();
    if (!of_columns) return;
    totals = {empty({1, pass.columns}, ScalarType::Float), empty({beside, 1, pass.columns}, ScalarType::Float)};
    column_total = totals.total.mutable_data_ptr<float>();
    column_held = totals.held.mutable_data_ptr<float>();
  }

  // Computes the sums of the columns [first, last) of chunk `start` + i.
  void run(const RowPass& pass, int64_t tokens, int64_t start, int64_t i, int64_t first, int64_t last) const {
    const int64_t c = start + i;
    RowPass part = pass;
    part.acc = c == 0 ? total : held + i * pass.rank * pass.columns;
    part.acc_stride = pass.columns;
    clear_columns(part.acc, pass.columns, pass.rank, first, last);
    if (column_total != nullptr) {
      part.totals = c == 0 ? column_total : column_held + i * pass.columns;
      std::fill_n(part.totals + first, last - first, 0.0f);
    }
    pass_kernels().row_pass(part, c * chunk, min_i64((c + 1) * chunk, tokens), first, last);
  }

  // Records that the chunks [start, start + count) are computed. If `now` is true, finish also adds the sums of these
  // chunks to the total; otherwise the sums are added later (see LateSums).
  void finish(int64_t start, int64_t count, bool now) {
    const int64_t in_place = start == 0 ? 1 : 0;
    for (LateSums* of : {&sums, &totals}) {
      if (!of->total.defined()) continue;
      // The sums of the first chunk are computed in the total's memory, so that the buffer of the first chunk is
      // unused.
      of->first = in_place;
      of->count = count - in_place;
      if (now) summed(of);
    }
  }
};

// Computes the sums of a pass whose threads divide the chunks of tokens, and m · right if the pass has `right`. beside:
// null, or a function that is called for the tokens of a chunk after the chunk's sums.
LateSums outer_by_chunks(const RowPass& pass, int64_t tokens, Tensor* totals, const TokenWork& beside) {
  ChunkSums sums(pass, tokens, totals != nullptr);
  const int64_t grain = pass_grain(min_i64(sums.chunk, tokens) * pass.columns * pass.rank);
  for (int64_t start = 0; start < sums.chunks; start += sums.together) {
    const int64_t count = min_i64(sums.together, sums.chunks - start);
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums.run(pass, tokens, start, i, 0, pass.columns);
        const int64_t first = (start + i) * sums.chunk;
        if (beside) beside(first, min_i64(first + sums.chunk, tokens));
      }
    });
    sums.finish(start, count, totals != nullptr || count < sums.chunks);
  }
  if (totals != nullptr) *totals = as_shape(sums.totals.total, {pass.columns});
  return sums.sums;
}

// Adds loops to `loops` that compute the sums of a pass without `right`. Each iteration of a loop works on a block of
// columns, for all tokens or for a chunk of the tokens. If the tokens are divided into chunks, and `totals` is wanted
// or the chunks' buffers are used more than once, add_outer_loops instead runs the loops itself.
LateSums add_outer_loops(Loops* loops, const RowPass& pass, int64_t tokens, Tensor* totals) {
  const int64_t threads = loop_threads(), columns = pass.columns, rank = pass.rank;
  const int64_t width = block_columns(tokens, columns, rank, threads, pass.dropout.active);
  const int64_t blocks = ceil_div(columns, width), of_element = rank + (pass.dropout.active ? kDrawCost : 0);
  if (sums_by_columns(tokens, columns, rank, threads, width)) {
    const Tensor sums = empty({rank, columns}, ScalarType::Float);
    float* data = sums.mutable_data_ptr<float>();
    if (totals != nullptr) *totals = empty({columns}, ScalarType::Float);
    float* to_totals = totals != nullptr ? totals->mutable_data_ptr<float>() : nullptr;
    loops->add(blocks, tokens * min_i64(width, columns) * of_element, [=](int64_t begin, int64_t end) {
      sum_columns(pass, tokens, begin * width, min_i64(end * width, columns), data, to_totals);
    });
    return {sums, Tensor()};
  }
  auto sums = std::make_shared<ChunkSums>(pass, tokens, totals != nullptr);
  const int64_t work = min_i64(sums->chunk, tokens) * min_i64(width, columns) * of_element;
  for (int64_t start = 0; start < sums->chunks; start += sums->together) {
    const int64_t count = min_i64(sums->together, sums->chunks - start);
    const bool late = count == sums->chunks && totals == nullptr;
    Loops own;
    (late ? loops : &own)->add(count * blocks, work, [=](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t i = begin / blocks, next = min_i64(end, (i + 1) * blocks);
        const int64_t first = (begin - i * blocks) * width, last = min_i64((next - i * blocks) * width, columns);
        sums->run(pass, tokens, start, i, first, last);
        begin = next;
      }
    });
    if (!late) own.run(kPassGrain);
    sums->finish(start, count, !late);
  }
  if (totals != nullptr) *totals = as_shape(sums->totals.total, {columns});
  return sums->sums;
}

}  // namespace

LateSums outer_pass(Loops* later, const RowPass& pass, int64_t tokens, Tensor* totals, const TokenWork& beside) {
  if (tokens == 0 || pass.columns == 0) {
    if (totals != nullptr) *totals = zeros({pass.columns});
    if (beside) beside(0, tokens);
    return {zeros({pass.rank, pass.columns}), Tensor()};
  }
  RowPass outer = pass;
  if (pass.right != nullptr) {
    if (!passes_apart(tokens, pass.columns, pass.rank, loop_threads()))
      return outer_by_chunks(pass, tokens, totals, beside);
    RowPass product = pass;
    product.left = nullptr;
    run_row_passes({product}, tokens, beside, 0);
    outer.right = nullptr;
    outer.out = nullptr;
  }
  return add_outer_loops(later, outer, tokens, totals);
}

Tensor run_outer_pass(const RowPass& pass, int64_t tokens, Tensor* totals) {
  Loops loops;
  LateSums sums = outer_pass(&loops, pass, tokens, totals, nullptr);
  loops.run(kPassGrain);
  return summed(&sums);
}

void run_expand(const Expand& work, int64_t tokens) {
  const PassKernels& isa = pass_kernels();
  const int64_t blocks = std::max<int64_t>(1, ceil_div(work.columns, kColumnsTogether));
  const int64_t width = min_i64(kColumnsTogether, work.columns);
  const int64_t grain = pass_grain(kTokenStep * width * (work.rank + kExpandPasses));
  parallel_for(0, ceil_div(tokens, kTokenStep) * blocks, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t step = begin / blocks, next = min_i64(end, (step + 1) * blocks);
      const int64_t first = (begin - step * blocks) * width;
      isa.expand(work, step * kTokenStep, min_i64((step + 1) * kTokenStep, tokens), first,
                 min_i64((next - step * blocks) * width, work.columns));
      begin = next;
    }
  });
}

KeepBits keep_bits(int64_t tokens, int64_t columns) {
  KeepBits keep;
  keep.per_row = ceil_div(columns, 32);
  keep.words = empty({tokens, keep.per_row}, ScalarType::Float);
  keep.data = static_cast<uint32_t*>(keep.words.mutable_data_ptr());
  return keep;
}

void drop_elements(const DropElements& work, int64_t count) {
  const PassKernels& isa = pass_kernels();
  parallel_for(0, ceil_div(count, kDropTogether), ceil_div(kPackGrain, kDropTogether), [&](int64_t begin, int64_t end) {
    isa.drop_elements(work, begin * kDropTogether, min_i64(end * kDropTogether, count));
  });
}

Tensor dropped_elements(const char* op, const Tensor& x, const Dropout& dropout) {
  Tensor out = empty({x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  drop_elements({x.const_data_ptr(), dtype_of(op, "x", x), dropout, out.mutable_data_ptr()}, x.numel());
  return out;
}

ColumnSums column_pass(const char* op, const Tensor& m, const Tensor* scale, float shift, const Tensor* other) {
  const int64_t columns = m.size(m.dim() - 1), tokens = rows_of(m);
  const Tensor held = as_contiguous(m);
  Tensor held_other;
  ColumnPass pass;
  pass.m = held.const_data_ptr();
  pass.dtype = dtype_of(op, "x", held);
  pass.columns = columns;
  ColumnSums result{none(m.scalar_type()), none()};
  if (scale != nullptr) {
    result.scaled = empty({m.sizes().begin(), m.sizes().end()}, m.scalar_type());
    pass.out = result.scaled.mutable_data_ptr();
    pass.scale = scale->const_data_ptr<float>();
    pass.shift = shift;
  }
  const PassKernels& isa = pass_kernels();
  if (other == nullptr) {
    parallel_for(0, tokens, ceil_div(kPackGrain, columns + 1),
                 [&](int64_t begin, int64_t end) { isa.column_pass(pass, begin, end); });
    return result;
  }
  STD_TORCH_CHECK(other->numel() == m.numel(), op, ": sizes ", m.numel(), " and ", other->numel(), " differ");
  held_other = as_contiguous(*other);
  pass.other = held_other.const_data_ptr();
  pass.other_dtype = dtype_of(op, "x", held_other);
  result.sums = sum_chunks(tokens, columns, [&](int64_t first, int64_t last, float* sums) {
    ColumnPass part = pass;
    part.sums = sums;
    isa.column_pass(part, first, last);
  });
  return result;
}

void run_few_tokens(const char* op, const Tensor& w, const Tensor& x, const Tensor& y, bool accumulate) {
  const FewTokens work{w.const_data_ptr(),        dtype_of(op, "weight", w),   w.size(0), w.size(1), x.size(0),
                       x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), accumulate};
  const PassKernels& isa = pass_kernels();
  parallel_for(0, work.rows, ceil_div(kPackGrain, work.columns * work.tokens),
               [&](int64_t begin, int64_t end) { isa.few_tokens(work, begin, end); });
}

RowFacts weight_row_facts(const char* op, const FrozenWeight& weight, const Tensor& lora_A, ScalarType type) {
  const ScratchOfCall scratch_of_call;
  check_matrix_weight(op, weight, type);
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = lora_A.size(0);
  RowFacts facts{zeros({n, rank}), zeros({n})};
  if (n == 0 || k == 0) return facts;
  const Tensor right = packed(op, "lora_A", lora_A, nullptr, nullptr, false, rank, k);
  const Tensor dense = weight.is_packed() ? Tensor() : as_contiguous(weight.weight);
  const PassKernels& isa = pass_kernels();
  parallel_for(0, ceil_div(n, kRowChunk), 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kRowChunk; first < min_i64(end * kRowChunk, n); first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, n);
      RowPass pass = weight_pass(op, weight, type, rank);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.right = right.const_data_ptr<float>();
      pass.out = facts.product.mutable_data_ptr<float>() + first * rank;
      pass.squares = facts.squares.mutable_data_ptr<float>() + first;
      isa.row_pass(pass, 0, last - first, 0, k);
    }
  });
  return facts;
}

Tensor weight_outer(const char* op, const FrozenWeight& weight, const Tensor& left, ScalarType type) {
  check_matrix_weight(op, weight, type);
  const int64_t n = weight.out_features(), k = weight.in_features(), rank = left.size(1);
  if (n == 0 || k == 0) return zeros({rank, k});
  const Tensor rows = as_contiguous(left);
  const Tensor dense = weight.is_packed() ? Tensor() : as_contiguous(weight.weight);
  const PassKernels& isa = pass_kernels();
  const Tensor sums = sum_chunks(n, k * rank, [&](int64_t begin, int64_t end, float* out) {
    for (int64_t first = begin; first < end; first += kRowChunk) {
      const int64_t last = min_i64(first + kRowChunk, end);
      RowPass pass = weight_pass(op, weight, type, rank);
      pass.m = weight_rows(weight, dense, type, first, last);
      pass.left = rows.const_data_ptr<float>() + first * rank;
      pass.acc = out;
      pass.acc_stride = k;
      isa.row_pass(pass, 0, last - first, 0, k);
    }
  });
  return as_shape(sums, {rank, k});
}

}  // namespace peft_ext
