// The glue of attention over a cache of keys and values: checks, writes the new ones, and runs the
// forward kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_put.h>

#include <algorithm>

#include "attention/attention_glue.h"
#include "attention/attention_ops.h"
#include "common/dispatch.h"

namespace fused {

using namespace attention_glue;

namespace {

void check_int32(const char* argument, const at::Tensor& tensor, at::IntArrayRef shape,
                 const at::Tensor& q) {
  FUSED_CHECK_TYPE(tensor.scalar_type() == at::kInt, kOp, ": ", argument, " must be int32, got ",
                   tensor.scalar_type());
  check_shape(kOp, argument, tensor, shape);
  check_same_device(kOp, argument, tensor, "q", q);
  FUSED_CHECK_VALUE(tensor.is_contiguous(), kOp, ": ", argument,
                    " must be contiguous, got strides ", tensor.strides());
}

// What can be told without waiting for a GPU.
void check_values(const at::Tensor& k_cache, const Cache& cache, int64_t room) {
  if (!is_readable(k_cache)) return;
  const int32_t* lengths = cache.cache_seqlens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < cache.cache_seqlens.size(0); ++b) {
    const int64_t keys = lengths[b] + cache.num_new_keys;
    FUSED_CHECK_VALUE(lengths[b] >= 0 && keys <= room, kOp,
                      ": cache_seqlens must be at least 0 and leave room for ", cache.num_new_keys,
                      " of ", room, " keys, got ", lengths[b]);
    if (!cache.block_table) continue;
    const int64_t page_size = k_cache.size(2), pages = k_cache.size(0);
    const int32_t* table =
        cache.block_table->const_data_ptr<int32_t>() + b * cache.block_table->size(1);
    for (int64_t page = 0; page * page_size < keys; ++page) {
      FUSED_CHECK_VALUE(table[page] >= 0 && table[page] < pages, kOp,
                        ": block_table must name one of ", pages, " pages, got ", table[page]);
    }
  }
}

void check_caches(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                  const Cache& cache) {
  check_device(kOp, "q", q);
  check_dim(kOp, "q", q, 4);
  dtype_of(kOp, "q", q);
  for (const auto& [argument, tensor] :
       {std::pair<const char*, const at::Tensor&>{"k_cache", k_cache}, {"v_cache", v_cache}}) {
    check_dim(kOp, argument, tensor, 4);
    check_same_device(kOp, argument, tensor, "q", q);
    check_same_dtype(kOp, argument, tensor, "q", q);
    FUSED_CHECK_VALUE(tensor.size(3) <= 1 || tensor.stride(3) == 1, kOp, ": ", argument,
                      " must have a contiguous last dimension, got strides ", tensor.strides());
  }
  FUSED_CHECK_VALUE(k_cache.size(3) == q.size(3), kOp, ": k_cache must have the head_dim of q (",
                    q.size(3), "), got ", k_cache.sizes());
  FUSED_CHECK_VALUE(v_cache.sizes().slice(0, 3) == k_cache.sizes().slice(0, 3), kOp,
                    ": v_cache must have the first three sizes of k_cache ", k_cache.sizes(),
                    ", got ", v_cache.sizes());
  const int64_t groups = k_cache.size(1);
  FUSED_CHECK_VALUE(groups == 0 ? q.size(1) == 0 : q.size(1) % groups == 0, kOp,
                    ": k_cache must have a number of heads that divides that of q (", q.size(1),
                    "), got ", k_cache.sizes());
  check_int32("cache_seqlens", cache.cache_seqlens, {q.size(0)}, q);
  if (cache.block_table) {
    check_dim(kOp, "block_table", *cache.block_table, 2);
    check_int32("block_table", *cache.block_table, {q.size(0), cache.block_table->size(1)}, q);
  } else {
    FUSED_CHECK_VALUE(k_cache.size(0) == q.size(0), kOp, ": k_cache must have the batch of q (",
                      q.size(0), "), got ", k_cache.sizes());
  }
}

void check_new(const char* argument, const at::Tensor& rows, const at::Tensor& q,
               const at::Tensor& cache, int64_t length) {
  check_shape(kOp, argument, rows, {q.size(0), cache.size(1), length, cache.size(3)});
  check_same_device(kOp, argument, rows, "q", q);
  check_same_dtype(kOp, argument, rows, "q", q);
}

// Writes rows [B, G, N, D] behind the cache_seqlens[b] that are there.
void append(const at::Tensor& tensor, const at::Tensor& rows, const Cache& cache) {
  // The caller says what is differentiable; here numbers are written.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto options = cache.cache_seqlens.options().dtype(at::kLong);
  at::Tensor place =
      at::add(cache.cache_seqlens.unsqueeze(1), at::arange(rows.size(2), options).unsqueeze(0));
  at::Tensor of = at::arange(rows.size(0), place.options()).unsqueeze(1).expand_as(place);
  if (cache.block_table) {
    const int64_t page_size = tensor.size(2);
    of = at::gather(*cache.block_table, 1, place.floor_divide(page_size)).to(at::kLong);
    place = place.remainder(page_size);
  }
  tensor.transpose(1, 2).index_put_({of, place}, rows.transpose(1, 2));
  bump_version(tensor);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention_with_kv_cache(
    const at::Tensor& q_in, const at::Tensor& k_cache, const at::Tensor& v_cache,
    const at::Tensor& cache_seqlens, const std::optional<at::Tensor>& k,
    const std::optional<at::Tensor>& v, const std::optional<at::Tensor>& block_table,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sink, bool is_causal, std::optional<double> scale,
    double softcap, int64_t window_left, int64_t window_right) {
  FUSED_CHECK_VALUE(k.has_value() == v.has_value(), kOp,
                    ": k and v must be given together, got one");
  if (k) check_dim(kOp, "k", *k, 4);
  const Cache cache{cache_seqlens, block_table, k ? k->size(-2) : 0};
  check_caches(q_in, k_cache, v_cache, cache);
  if (k) {
    check_new("k", *k, q_in, k_cache, cache.num_new_keys);
    check_new("v", *v, q_in, v_cache, cache.num_new_keys);
  }
  check_values(k_cache, cache,
               block_table ? block_table->size(1) * k_cache.size(2) : k_cache.size(2));
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in);
  const std::optional<at::Tensor> none;
  AttentionForwardParams params{};
  fill_problem(params, q, k_cache, v_cache,
               {attn_mask, alibi_slopes, sink, none, none, none, 0.0, is_causal, scale, softcap,
                window_left, window_right},
               &cache);

  const Results results = make_results(params, q, v_cache.size(-1));
  if (k) {
    append(k_cache, *k, cache);
    append(v_cache, *v, cache);
  }
  if (results.lse.numel() > 0) check_status(kOp, FUSED_DISPATCH(q, attention_forward, params));
  return {results.out, results.lse};
}

}  // namespace fused
