// The CPU operators of scaled dot-product attention: checks, allocation and threads; attention/kernels_impl.h has the
// kernels. The threads divide the blocks of queries in the forward (for few queries, groups of up to kFewRows rows as
// in few.h), and cells of queries and keys in the backward (attention/plan.h). How a sum is divided into partial sums
// does not depend on the number of threads, so that the bits of the results are equal for every number of threads.
#include <cmath>
#include <optional>
#include <tuple>

#include "common/registration.h"
#include "attention/kernels.h"
#include "attention/mask.h"
#include "attention/operators.h"
#include "attention/plan.h"
#include "cpu/isa.h"
#include "cpu/operator_call.h"
#include "cpu/scratch.h"
#include "cpu/tensor.h"
#include "cpu/threads.h"
#include "linear/cpu/adapted_linear.h"

namespace peft_ext {
namespace {

// The backward divides the query heads of each key head into splits, until there are at least kStreams streams
// (attention/plan.h), or each query head is a split of its own. kMostSums may lower the number of splits.
constexpr int64_t kStreams = 32;
// Largest number of floats (128 MiB) in the sums of dK and dV of all splits, and also in the sums of dQ of the streams
// that run at the same time. The sums of a single split or of a single stream may exceed kMostSums.
constexpr int64_t kMostSums = int64_t{1} << 25;

// Raises an error unless `given` [B, H, T, S] has the sizes in `wanted`, or 1.
void check_scores(const char* op, const char* argument, const Tensor& given, const int64_t (&wanted)[4]) {
  STD_TORCH_CHECK(given.dim() == 4, op, ": ", argument, " is not [B, H, T, S]");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(given.size(d) == wanted[d] || given.size(d) == 1, op, ": ", argument, " has ", given.size(d),
                    " in dimension ", d, ", wanted ", wanted[d], " or 1");
}

void check_mask(const char* op, const Tensor& mask, const int64_t (&wanted)[4]) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": mask is not of bools");
  check_scores(op, "mask", mask, wanted);
}

void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& mask, double scale, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && v.size(0) == q.size(0) &&
                      k.size(3) == q.size(3) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
                  op, ": q, k and v are not [B, H, T, D], [B, Hkv, S, D] and [B, Hkv, S, Dv]");
  STD_TORCH_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, op, ": q has ", q.size(1),
                  " heads, wanted a multiple of k's ", k.size(1));
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
                  ": k or v is not of q's type");
  STD_TORCH_CHECK(scale > 0.0 && std::isfinite(scale), op, ": scale is ", scale, ", wanted a finite number above 0");
  const int64_t wanted[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  if (mask.has_value()) check_mask(op, *mask, wanted);
  if (bias.has_value()) {
    dtype_of(op, "bias", *bias);
    check_scores(op, "bias", *bias, wanted);
  }
}

HeadsOf heads_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// Returns an empty tensor [B, H, T, D] with the memory layout [B, T, H, D], which the layer after the attention needs.
// PyTorch's autograd does not treat the result as a view.
Tensor empty_heads(int64_t batches, int64_t heads, int64_t tokens, int64_t size, ScalarType type) {
  const Tensor held = empty({batches, tokens, heads, size}, type);
  const int64_t shape[] = {batches, heads, tokens, size};
  const int64_t strides[] = {held.stride(0), held.stride(2), held.stride(1), 1};
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(held.get(), 4, shape, strides, 0, &out));
  return Tensor(out);
}

// Packs the bool mask into 64-bit words; a word has one bit for each of 64 queries and one key. The shape of the packed
// mask is [B or 1, H or 1, ceil(queries / 64), keys].
Tensor mask_words(const Tensor& mask, int64_t queries, int64_t keys) {
  const int64_t batches = mask.size(0), heads = mask.size(1), blocks = ceil_div(queries, kMaskBits);
  const Tensor words = empty({batches, heads, blocks, keys, 8}, ScalarType::Byte);
  uint64_t* out = reinterpret_cast<uint64_t*>(words.mutable_data_ptr());
  const uint8_t* data = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t of_query = mask.size(2) == 1 ? 0 : mask.stride(2), of_key = mask.size(3) == 1 ? 0 : mask.stride(3);
  parallel_for(0, batches * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t at = unit / blocks, block = unit % blocks;
      const uint8_t* from = data + at / heads * mask.stride(0) + at % heads * mask.stride(1);
      const int64_t first = block * kMaskBits;
      pack_mask_block(from + first * of_query, of_query, of_key, min_i64(kMaskBits, queries - first), keys,
                      out + unit * keys);
    }
  });
  return words;
}

}  // namespace

const AttentionKernels& attention_kernels(DType dtype) {
#if defined(__x86_64__)
  if (dtype == DType::kBF16 && current_isa() == Isa::kAmx) return kAttentionKernelsAmx;
  if (dtype == DType::kBF16 && current_isa() == Isa::kAmxEmulated) return kAttentionKernelsAmxEmulated;
  if (dtype == DType::kBF16 && current_isa() == Isa::kAvx512Bf16) return kAttentionKernelsAvx512Bf16;
  return select_kernels(&kAttentionKernelsScalar, &kAttentionKernelsAvx2, &kAttentionKernelsAvx512);
#elif defined(__aarch64__)
  return select_kernels(&kAttentionKernelsScalar, &kAttentionKernelsNeon);
#else
  return kAttentionKernelsScalar;
#endif
}

void set_seen(const char* op, const Tensor& mask, Attention* work) {
  check_mask(op, mask, {work->batches, work->heads, work->queries, work->keys});
  const auto stride = [&](int d) { return mask.size(d) == 1 ? int64_t{0} : mask.stride(d); };
  work->seen = static_cast<const uint8_t*>(mask.const_data_ptr());
  work->seen_batch = stride(0);
  work->seen_head = stride(1);
  work->seen_query = stride(2);
  work->seen_key = stride(3);
}

namespace {

// The arguments of one call of an attention operator, and the tensors that the call must keep alive.
struct Call {
  const AttentionKernels& isa;
  const bool is_backward;
  Attention work = {};
  Tensor q, k, v;
  std::vector<Tensor> held;

  Call(const char* op, bool backward, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
       const std::optional<Tensor>& mask, bool causal, double scale, double dropout_p,
       const std::optional<Tensor>& seed, const std::optional<Tensor>& bias)
      : isa(attention_kernels(dtype_of(op, "q", q_in))),
        is_backward(backward),
        q(with_whole_rows(q_in)),
        k(with_whole_rows(k_in)),
        v(with_whole_rows(v_in)) {
    check_attention(op, q, k, v, mask, scale, bias);
    work.dtype = dtype_of(op, "q", q);
    work.batches = q.size(0);
    work.heads = q.size(1);
    work.kv_heads = k.size(1);
    work.queries = q.size(2);
    work.keys = k.size(2);
    work.size = q.size(3);
    work.value_size = v.size(3);
    work.scale = static_cast<float>(scale);
    work.causal = causal;
    work.dropout = make_dropout(op, dropout_p, seed);
    work.q = heads_of(q);
    work.k = heads_of(k);
    work.v = heads_of(v);
    if (mask.has_value() && mask->numel() > 0 && has_few_queries(bias)) {
      set_seen(op, *mask, &work);
    } else if (mask.has_value() && mask->numel() > 0) {
      const Tensor words = hold(mask_words(*mask, work.queries, work.keys));
      work.mask = reinterpret_cast<const uint64_t*>(words.const_data_ptr());
      work.mask_head = words.size(1) == 1 ? 0 : words.size(2) * words.size(3);
      work.mask_batch = words.size(0) == 1 ? 0 : words.size(1) * words.size(2) * words.size(3);
    }
    if (bias.has_value() && bias->numel() > 0) {
      const auto stride = [&](int d) { return bias->size(d) == 1 ? int64_t{0} : bias->stride(d); };
      work.bias = bias->const_data_ptr();
      work.bias_dtype = dtype_of(op, "bias", *bias);
      work.bias_batch = stride(0);
      work.bias_head = stride(1);
      work.bias_query = stride(2);
      work.bias_key = stride(3);
    }
  }

  // Returns whether the kernel for few queries computes the call.
  bool has_few_queries(const std::optional<Tensor>& bias) const {
    return !is_backward && work.queries <= kFewQueries && !work.dropout.active && !bias.has_value();
  }

  const Tensor& hold(const Tensor& tensor) { return held.emplace_back(tensor); }
  bool lies_right(int64_t depth) const { return isa.in_place && work.dtype == isa.element && depth % isa.depth == 0; }
  int64_t kv_units() const { return work.batches * work.kv_heads; }
  int64_t whole_vectors(int64_t columns) const { return ceil_div(columns, isa.width) * isa.width; }

  // Allocates memory for the copies of k or v as left operands [rows, depth] of products, one copy for each key head of
  // each batch; rows and depth are padded.
  void* operand(int64_t rows, int64_t depth) {
    const ScalarType type = isa.element == DType::kBF16 ? ScalarType::BFloat16 : ScalarType::Float;
    const int64_t padded_rows = ceil_div(rows, isa.left_rows) * isa.left_rows;
    const int64_t padded_depth = ceil_div(depth, isa.depth) * isa.depth;
    return hold(empty({kv_units(), padded_rows, padded_depth}, type)).mutable_data_ptr();
  }

  // Allocates the sums of dK and dV [splits, B · Hkv, keys, columns padded to whole vectors] in the calling thread's
  // scratch. After the call the thread keeps the scratch, unless the scratch is large, because new memory costs a page
  // fault per page.
  void take_sums() {
    const int64_t rows = work.splits * kv_units() * work.keys;
    const int64_t of_keys = rows * whole_vectors(work.size), of_values = rows * whole_vectors(work.value_size);
    const size_t bytes = static_cast<size_t>(of_keys + of_values) * sizeof(float);
    work.key_sums = static_cast<float*>(scratch(Scratch::kTokens, bytes + sizeof(float)));
    work.value_sums = work.key_sums + of_keys;
  }

  // Allocates the sums of dQ [slots, blocks of queries, size, 64] in the calling thread's scratch; a slot holds the
  // sums of one stream (see attention/plan.h).
  void take_query_sums(int64_t slots) {
    const int64_t count = slots * ceil_div(work.queries, kPlanBlock) * kPlanBlock * work.size;
    work.query_sums =
        static_cast<float*>(scratch(Scratch::kMoreTokens, static_cast<size_t>(count + 1) * sizeof(float)));
  }

  void pack() {
    in_parallel(kv_units() * ceil_div(work.keys, kPlanBlock), isa.pack_scratch(work),
                [&](int64_t begin, int64_t end, void* own) { isa.pack(work, begin, end, own); });
  }

  // Calls f(begin, end, scratch) in parallel for parts [begin, end) of [0, units); `scratch` has `bytes` bytes.
  template <typename F>
  void in_parallel(int64_t units, size_t bytes, const F& f) {
    parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      f(begin, end, scratch(Scratch::kPanel, bytes));
      // Releases the scratch of f if this scratch is large, for example for a head size of thousands. The scratch that
      // holds the sums stays allocated, because other threads may still use the sums.
      release_large_scratch(Scratch::kPanel);
    });
  }
};

std::tuple<Tensor, Tensor> scaled_dot_product_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                                            bool is_causal, double scale, double dropout_p,
                                                            std::optional<Tensor> seed, std::optional<Tensor> bias) {
  Call call("scaled_dot_product_attention", false, q, k, v, mask, is_causal, scale, dropout_p, seed, bias);
  Attention& work = call.work;
  const Tensor out = empty_heads(work.batches, work.heads, work.queries, work.value_size, q.scalar_type());
  const Tensor lse = empty({work.batches, work.heads, work.queries}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  work.out = heads_of(out);
  work.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (call.has_few_queries(bias)) {
    const int64_t rows = work.heads / work.kv_heads * work.queries;
    call.in_parallel(call.kv_units() * ceil_div(rows, kFewRows), call.isa.few_scratch(work),
                     [&](int64_t begin, int64_t end, void* own) { call.isa.few(work, begin, end, own); });
    return {out, lse};
  }
  if (!call.lies_right(work.size)) work.key_rows = call.operand(work.keys, work.size);
  work.value_columns = call.operand(work.value_size, work.keys);
  call.pack();
  const ForwardPlan plan = plan_forward(work.batches * work.heads, work.queries, loop_threads());
  call.in_parallel(plan.parts, call.isa.forward_scratch(work), [&](int64_t begin, int64_t end, void* own) {
    for (int64_t part = begin; part < end; ++part)
      for (const ForwardUnit& unit : plan.units(part)) call.isa.forward(work, unit, own);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> scaled_dot_product_attention_backward_cpu(
    Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, std::optional<Tensor> mask, bool is_causal,
    double scale, double dropout_p, std::optional<Tensor> seed, std::optional<Tensor> bias) {
  constexpr const char* kOp = "scaled_dot_product_attention_backward";
  Call call(kOp, true, q, k, v, mask, is_causal, scale, dropout_p, seed, bias);
  Attention& work = call.work;
  for (const Tensor* of : {&grad, &out})
    STD_TORCH_CHECK(of->dim() == 4 && of->size(0) == q.size(0) && of->size(1) == q.size(1) &&
                        of->size(2) == q.size(2) && of->size(3) == v.size(3) && of->scalar_type() == q.scalar_type(),
                    kOp, ": grad or out is not [B, H, T, Dv] of q's type");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) && lse.size(2) == q.size(2) &&
                      lse.scalar_type() == ScalarType::Float,
                  kOp, ": lse is not [B, H, T] of float32");
  const Tensor grad_q = like_with_whole_rows(q), grad_k = like_with_whole_rows(k), grad_v = like_with_whole_rows(v);
  const Tensor held_grad = with_whole_rows(grad), held_out = with_whole_rows(out), held_lse = as_contiguous(lse);
  work.grad = heads_of(held_grad);
  work.out = heads_of(held_out);
  work.lse = static_cast<float*>(const_cast<void*>(held_lse.const_data_ptr()));
  work.grad_q = heads_of(grad_q);
  work.grad_k = heads_of(grad_k);
  work.grad_v = heads_of(grad_v);
  const int64_t units = call.kv_units(), group = work.kv_heads > 0 ? work.heads / work.kv_heads : 0;
  if (units == 0) return {grad_q, grad_k, grad_v};
  for (work.splits = 1; work.splits < group && (units * work.splits < kStreams || group % work.splits != 0);)
    ++work.splits;
  if (work.splits < 1) work.splits = 1;
  // Each split has its own sums of dK and dV for all keys. The loop lowers the number of splits until the sums of all
  // splits have at most kMostSums floats, or one split is left.
  const int64_t lanes = call.whole_vectors(work.size) + call.whole_vectors(work.value_size);
  while (work.splits > 1 && work.splits * units * work.keys * lanes > kMostSums) do
      --work.splits;
    while (group % work.splits != 0);
  const ScratchOfCall scratch_of_call;
  call.take_sums();
  if (!call.lies_right(work.size)) work.key_rows = call.operand(work.keys, work.size);
  if (!call.lies_right(work.value_size)) work.value_rows = call.operand(work.keys, work.value_size);
  work.key_columns = call.operand(work.size, work.keys);
  const BackwardPlan plan = plan_backward(units * work.splits, group / work.splits, work.queries, work.keys, work.size,
                                          work.causal, loop_threads(), kMostSums);
  if (!plan.whole()) call.take_query_sums(plan.at_once);
  work.reached = min_i64(work.keys, plan.reached() * kPlanBlock);
  call.pack();
  plan.each_region([&](const BackwardRegion& region) {
    call.in_parallel(plan.parts(region), call.isa.backward_scratch(work), [&](int64_t begin, int64_t end, void* own) {
      const int64_t stop = plan.first_cell(region, end);
      for (int64_t at = plan.first_cell(region, begin); at < stop; ++at)
        call.isa.backward(work, plan.cell(region, at), own);
    });
  });
  parallel_for(0, units * work.keys, kMaskBits, [&](int64_t begin, int64_t end) { call.isa.finish(work, begin, end); });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace peft_ext

PEFT_EXT_OPERATORS(CPU, m) {
  m.impl("scaled_dot_product_attention", PEFT_EXT_CPU_BOX(&peft_ext::scaled_dot_product_attention_cpu));
  m.impl("scaled_dot_product_attention_backward",
         PEFT_EXT_CPU_BOX(&peft_ext::scaled_dot_product_attention_backward_cpu));
}
