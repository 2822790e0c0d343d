// What the glue of all attention functions shares: the op's options, checked, as the kernels read
// them, and tensors in the layouts that they write.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "attention/attention.h"
#include "common/checks.h"

namespace fused {
namespace attention_glue {

inline constexpr const char* kOp = "attention";

// The op's options as they come.
struct Options {
  const std::optional<at::Tensor>&attn_mask, &alibi_slopes, &sink, &rng, &cu_seqlens_q,
      &cu_seqlens_k;
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  double softcap;
  int64_t window_left, window_right;
};

// Whether the host can look at what a tensor holds without waiting for a device.
bool is_readable(const at::Tensor& tensor);

// The sizes of [batch, heads, length, width], or of packed [length, heads, width].
struct Sizes {
  int64_t batch, heads, length, width;
};
Sizes sizes_of(const at::Tensor& tensor);
HeadStrides head_strides(const at::Tensor& tensor);

// Kernels ask for a contiguous last dimension and take any other stride.
at::Tensor with_contiguous_rows(const at::Tensor& tensor);

// With zeros behind each row, to the next width that is a multiple; and the first `width` columns
// of such a result, in a tensor of their own. What need not change is returned as it is.
at::Tensor padded_rows(const at::Tensor& tensor, int64_t multiple);
at::Tensor unpadded_rows(const at::Tensor& tensor, int64_t width);

// Like `tensor`, with rows of `width`, laid out as [batch, length, heads, width]: what the layer
// after an attention reads in order. Not a view, which nobody could change in place once it has a
// derivative.
at::Tensor empty_heads(const at::Tensor& tensor, int64_t width);

// The shape of one value, or of `values`, for each row of q: [B, H, S], or packed [H, S].
std::vector<int64_t> rows_shape(const at::Tensor& q, std::optional<int64_t> values = std::nullopt);

// float32, or float64 for float64.
at::ScalarType compute_dtype(const at::Tensor& q);
void check_compute_dtype(const char* argument, const at::Tensor& tensor, const at::Tensor& q);

// A mask for a problem whose sizes are known. For sequences of their own lengths it brings its own
// number of rows and columns.
AttentionMask make_mask(const at::Tensor& mask, const at::Tensor& q, const AttentionProblem& p,
                        bool own_lengths);

// A value for each head, or nullptr.
const void* head_values(const char* argument, const std::optional<at::Tensor>& maybe_values,
                        const at::Tensor& q);

// q, k and v as the op takes them, before anything else is looked at.
void check_operands(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool packed);

// Fills what the forward and the backward pass share. The tensors outlive the params. A cache is
// what k and v are, which then may be pages.
struct Cache {
  const at::Tensor& cache_seqlens;
  const std::optional<at::Tensor>& block_table;
  int64_t num_new_keys;
};
void fill_problem(AttentionProblem& problem, const at::Tensor& q, const at::Tensor& k,
                  const at::Tensor& v, const Options& options, const Cache* maybe_cache = nullptr);

// What the forward pass writes, allocated and named in the params. `may_split`: it may deal out the
// work by keys, and is given room for that.
struct Results {
  at::Tensor out, lse, row_stats, partials;
};
Results make_results(AttentionForwardParams& params, const at::Tensor& q, int64_t head_dim_v,
                     bool may_split = true);

}  // namespace attention_glue
}  // namespace fused
