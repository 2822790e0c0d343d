#include "attention/attention_glue.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention_split.h"
#include "common/dispatch.h"
#include "common/tf32.h"

#if defined(FUSED_EMULATED)
#include "emulator/capture.h"
#endif

namespace fused {
namespace attention_glue {

bool is_readable(const at::Tensor& tensor) {
#if defined(FUSED_EMULATED)
  if (emulator::is_capturing()) return false;
#endif
  return tensor.is_cpu();
}

namespace {

void set_dropout(AttentionProblem& problem, double dropout_p,
                 const std::optional<at::Tensor>& maybe_rng, const at::Tensor& q) {
  FUSED_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, kOp,
                    ": dropout_p must be between 0 and 1, got ", dropout_p);
  if (dropout_p == 0) return;
  FUSED_CHECK_VALUE(maybe_rng.has_value(), kOp, ": rng must be given with dropout_p > 0, got None");
  const at::Tensor& rng = *maybe_rng;
  FUSED_CHECK_TYPE(rng.scalar_type() == at::kLong, kOp, ": rng must be int64, got ",
                   rng.scalar_type());
  check_shape(kOp, "rng", rng, {2});
  check_same_device(kOp, "rng", rng, "q", q);
  FUSED_CHECK_VALUE(rng.is_contiguous(), kOp, ": rng must be contiguous, got strides ",
                    rng.strides());
  problem.maybe_rng = rng.const_data_ptr<int64_t>();
  problem.drop_threshold = static_cast<uint32_t>(std::min(std::ldexp(dropout_p, 32), 4294967295.0));
  problem.keep_scale = scalar(dropout_p == 1 ? 0 : 1 / (1 - dropout_p));
}

// A bound beyond all keys is one that no length can reach.
int32_t window_bound(const char* argument, int64_t bound) {
  FUSED_CHECK_VALUE(bound >= -1, kOp, ": ", argument, " must be at least -1, got ", bound);
  return static_cast<int32_t>(std::min<int64_t>(bound, kMaxLength));
}

// What can be told without waiting for a GPU; its kernels take any value of cu_seqlens for some
// division of the rows.
const int32_t* check_cu_seqlens(const char* argument, const at::Tensor& cu_seqlens,
                                const char* operand, const at::Tensor& rows) {
  FUSED_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, kOp, ": ", argument,
                   " must be int32, got ", cu_seqlens.scalar_type());
  check_dim(kOp, argument, cu_seqlens, 1);
  FUSED_CHECK_VALUE(cu_seqlens.size(0) > 0, kOp, ": ", argument,
                    " must have one element more than there are sequences, got none");
  check_same_device(kOp, argument, cu_seqlens, "q", rows);
  FUSED_CHECK_VALUE(cu_seqlens.is_contiguous(), kOp, ": ", argument,
                    " must be contiguous, got strides ", cu_seqlens.strides());
  const int32_t* values = cu_seqlens.const_data_ptr<int32_t>();
  if (!is_readable(cu_seqlens)) return values;
  const int32_t* end = values + cu_seqlens.size(0);
  FUSED_CHECK_VALUE(values[0] == 0 && std::is_sorted(values, end) && end[-1] <= rows.size(0), kOp,
                    ": ", argument, " must rise from 0 to at most the rows of ", operand, " (",
                    rows.size(0), "), got ", at::IntArrayRef(std::vector<int64_t>(values, end)));
  return values;
}

void set_sequences(AttentionProblem& problem, const at::Tensor& q, const at::Tensor& k,
                   const Options& options) {
  problem.num_sequences = problem.batch;
  if (!options.cu_seqlens_q && !options.cu_seqlens_k) return;
  FUSED_CHECK_VALUE(options.cu_seqlens_q && options.cu_seqlens_k, kOp,
                    ": cu_seqlens_q and cu_seqlens_k must be given together, got one");
  const at::Tensor &of_q = *options.cu_seqlens_q, &of_k = *options.cu_seqlens_k;
  problem.maybe_cu_seqlens_q = check_cu_seqlens("cu_seqlens_q", of_q, "q", q);
  problem.maybe_cu_seqlens_k = check_cu_seqlens("cu_seqlens_k", of_k, "k", k);
  FUSED_CHECK_VALUE(of_q.size(0) == of_k.size(0), kOp,
                    ": cu_seqlens_k must have the size of cu_seqlens_q (", of_q.size(0), "), got ",
                    of_k.size(0));
  problem.num_sequences = checked_int32(kOp, "the number of sequences", of_q.size(0) - 1);
}

void set_cache(AttentionProblem& problem, const at::Tensor& k, const Cache& cache) {
  problem.maybe_cache_seqlens = cache.cache_seqlens.const_data_ptr<int32_t>();
  problem.num_new_keys = checked_int32(kOp, "the number of new keys", cache.num_new_keys);
  if (!cache.block_table) return;
  problem.maybe_block_table = cache.block_table->const_data_ptr<int32_t>();
  problem.page_size = problem.seqlen_k;
  problem.pages_of_sequence = checked_int32(kOp, "the pages", cache.block_table->size(1));
  problem.seqlen_k =
      checked_int32(kOp, "the length of the cache", cache.block_table->size(1) * k.size(2));
}

}  // namespace

AttentionMask make_mask(const at::Tensor& mask, const at::Tensor& q, const AttentionProblem& p,
                        bool own_lengths) {
  check_same_device(kOp, "attn_mask", mask, "q", q);
  const bool is_bool = mask.scalar_type() == at::kBool;
  int64_t shape[] = {p.num_sequences, p.num_heads, p.seqlen_q, p.seqlen_k};
  int64_t strides[] = {0, 0, 0, 0};
  int32_t extents[] = {0, 0, kMaxLength, kMaxLength};
  for (int64_t dim = 2; own_lengths && dim < 4; ++dim) {
    shape[dim] = mask.dim() >= 4 - dim ? mask.size(dim - 4) : 1;
  }
  bool broadcasts = mask.dim() <= 4;
  for (int64_t i = 0; broadcasts && i < mask.dim(); ++i) {
    const int64_t dim = 4 - mask.dim() + i;
    broadcasts = mask.size(i) == shape[dim] || mask.size(i) == 1;
    if (mask.size(i) == 1) continue;
    strides[dim] = mask.stride(i);
    extents[dim] = checked_int32(kOp, "a size of attn_mask", mask.size(i));
  }
  FUSED_CHECK_VALUE(broadcasts, kOp, ": attn_mask must be broadcastable to ",
                    at::IntArrayRef(shape), ", got ", mask.sizes());
  return {mask.const_data_ptr(),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          extents[2],
          extents[3],
          is_bool ? MaskKind::kBool : MaskKind::kAdditive,
          is_bool ? DType::kFloat32 : dtype_of(kOp, "attn_mask", mask)};
}

const void* head_values(const char* argument, const std::optional<at::Tensor>& maybe_values,
                        const at::Tensor& q) {
  if (!maybe_values) return nullptr;
  check_shape(kOp, argument, *maybe_values, {sizes_of(q).heads});
  check_compute_dtype(argument, *maybe_values, q);
  FUSED_CHECK_VALUE(maybe_values->is_contiguous(), kOp, ": ", argument,
                    " must be contiguous, got strides ", maybe_values->strides());
  return maybe_values->const_data_ptr();
}

Sizes sizes_of(const at::Tensor& tensor) {
  if (tensor.dim() == 3) return {1, tensor.size(1), tensor.size(0), tensor.size(2)};
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

HeadStrides head_strides(const at::Tensor& tensor) {
  if (tensor.dim() == 3) return {0, tensor.stride(1), tensor.stride(0)};
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

at::Tensor padded_rows(const at::Tensor& tensor, int64_t multiple) {
  const int64_t rest = tensor.size(-1) % multiple;
  return rest == 0 ? tensor : at::constant_pad_nd(tensor, {0, multiple - rest});
}

at::Tensor unpadded_rows(const at::Tensor& tensor, int64_t width) {
  if (tensor.size(-1) <= width) return tensor;  // or none, where it was not needed
  return empty_heads(tensor, width).copy_(tensor.narrow(-1, 0, width));
}

at::Tensor empty_heads(const at::Tensor& tensor, int64_t width) {
  const Sizes sizes = sizes_of(tensor);
  if (tensor.dim() == 3) return at::empty({sizes.length, sizes.heads, width}, tensor.options());
  return at::empty_strided({sizes.batch, sizes.heads, sizes.length, width},
                           {sizes.length * sizes.heads * width, width, sizes.heads * width, 1},
                           tensor.options());
}

std::vector<int64_t> rows_shape(const at::Tensor& q, std::optional<int64_t> values) {
  const Sizes sizes = sizes_of(q);
  std::vector<int64_t> shape;
  if (values) shape.push_back(*values);
  if (q.dim() == 4) shape.push_back(sizes.batch);
  shape.insert(shape.end(), {sizes.heads, sizes.length});
  return shape;
}

at::ScalarType compute_dtype(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_compute_dtype(const char* argument, const at::Tensor& tensor, const at::Tensor& q) {
  check_same_device(kOp, argument, tensor, "q", q);
  FUSED_CHECK_TYPE(tensor.scalar_type() == compute_dtype(q), kOp, ": ", argument,
                   " must be float32 (float64 for float64), got ", tensor.scalar_type());
}

void check_operands(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool packed) {
  const int64_t dims = packed ? 3 : 4;
  check_device(kOp, "q", q);
  check_dim(kOp, "q", q, dims);
  dtype_of(kOp, "q", q);
  const auto check = [&](const char* argument, const at::Tensor& tensor) {
    check_dim(kOp, argument, tensor, dims);
    check_same_device(kOp, argument, tensor, "q", q);
    check_same_dtype(kOp, argument, tensor, "q", q);
    FUSED_CHECK_VALUE(packed || tensor.size(0) == q.size(0), kOp, ": ", argument,
                      " must have the batch of q (", q.size(0), "), got ", tensor.sizes());
  };
  check("k", k);
  check("v", v);
  const Sizes of_q = sizes_of(q), of_k = sizes_of(k), of_v = sizes_of(v);
  FUSED_CHECK_VALUE(of_k.width == of_q.width, kOp, ": k must have the head_dim of q (", of_q.width,
                    "), got ", k.sizes());
  FUSED_CHECK_VALUE(of_v.length == of_k.length, kOp, ": v must have the length of k (", of_k.length,
                    "), got ", v.sizes());
  FUSED_CHECK_VALUE(of_v.heads == of_k.heads, kOp, ": v must have the heads of k (", of_k.heads,
                    "), got ", v.sizes());
  const bool grouped = of_k.heads == 0 ? of_q.heads == 0 : of_q.heads % of_k.heads == 0;
  FUSED_CHECK_VALUE(grouped, kOp, ": k must have a number of heads that divides that of q (",
                    of_q.heads, "), got ", k.sizes());
}

void fill_problem(AttentionProblem& problem, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const Options& options, const Cache* maybe_cache) {
  const Sizes of_q = sizes_of(q), of_k = sizes_of(k);
  problem.q = q.const_data_ptr();
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.q_strides = head_strides(q);
  problem.k_strides = head_strides(k);
  problem.v_strides = head_strides(v);
  problem.batch = checked_int32(kOp, "the batch", of_q.batch);
  problem.num_heads = checked_int32(kOp, "the number of heads", of_q.heads);
  problem.num_heads_kv = checked_int32(kOp, "the number of key heads", of_k.heads);
  problem.seqlen_q = checked_int32(kOp, "the length of q", of_q.length);
  problem.seqlen_k = checked_int32(kOp, "the length of k", of_k.length);
  problem.head_dim = checked_int32(kOp, "head_dim", of_q.width);
  problem.head_dim_v = checked_int32(kOp, "the head_dim of v", v.size(-1));
  set_sequences(problem, q, k, options);
  if (maybe_cache != nullptr) set_cache(problem, k, *maybe_cache);
  if (options.attn_mask) {
    const bool own_lengths = maybe_cache != nullptr || options.cu_seqlens_q;
    problem.mask = make_mask(*options.attn_mask, q, problem, own_lengths);
  }
  problem.maybe_alibi_slopes = head_values("alibi_slopes", options.alibi_slopes, q);
  problem.maybe_sink = head_values("sink", options.sink, q);
  problem.window_left = window_bound("window_left", options.window_left);
  problem.window_right = window_bound("window_right", options.window_right);
  problem.scale = scalar(options.scale.value_or(1 / std::sqrt(static_cast<double>(of_q.width))));
  FUSED_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), kOp,
                    ": softcap must be positive and finite, or 0 for none, got ", options.softcap);
  problem.softcap = scalar(options.softcap);
  problem.causal = options.is_causal;
  problem.dtype = dtype_of(kOp, "q", q);
  problem.allow_tf32 = may_round_to_tf32(q, at::Float32Op::MATMUL);
  set_dropout(problem, options.dropout_p, options.rng, q);
  check_supported(kOp, attention_unsupported(problem));
}

Results make_results(AttentionForwardParams& params, const at::Tensor& q, int64_t head_dim_v,
                     bool may_split) {
  Results results;
  results.out = empty_heads(q, head_dim_v);
  results.lse = at::empty(rows_shape(q), q.options().dtype(compute_dtype(q)));
  results.row_stats = at::empty(rows_shape(q, 2), results.lse.options());
  params.out = results.out.mutable_data_ptr();
  params.lse = results.lse.mutable_data_ptr();
  params.row_stats = results.row_stats.mutable_data_ptr();
  params.out_strides = head_strides(results.out);
  const int64_t size = may_split ? split_partials(params) : 0;
  if (size > 0 && runs_on_cuda(q)) {
    results.partials = at::empty({size}, results.lse.options());
    params.maybe_partials = results.partials.mutable_data_ptr();
  }
  return results;
}

}  // namespace attention_glue
}  // namespace fused
