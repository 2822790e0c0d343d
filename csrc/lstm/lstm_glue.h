// What the cell's and the layer's glue share: checks, and access to maybe-tensors.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "common/checks.h"
#include "common/dispatch.h"
#include "lstm/lstm.h"

namespace fused {

// Inside the glue the library's products are plain functions: autograd was dealt with outside, and
// so was autocast, whose casts would come between a product and the buffer that it fills.
struct PlainProducts {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

inline bool has(const std::optional<at::Tensor>& maybe_tensor) {
  return maybe_tensor.has_value() && maybe_tensor->defined();
}

inline at::Tensor contiguous_or_undefined(const std::optional<at::Tensor>& maybe_tensor) {
  return has(maybe_tensor) ? maybe_tensor->contiguous() : at::Tensor();
}

inline const void* pointer_or_null(const at::Tensor& maybe_undefined) {
  return maybe_undefined.defined() ? maybe_undefined.const_data_ptr() : nullptr;
}

// What a backward op returns for a gradient that nobody wants: a registered op must return tensors.
inline at::Tensor not_needed(const at::Tensor& like) { return at::empty({0}, like.options()); }

inline void check_like_input(const char* op, const char* argument, const at::Tensor& tensor,
                             const at::Tensor& input, at::IntArrayRef shape) {
  check_same_dtype(op, argument, tensor, "input", input);
  check_same_device(op, argument, tensor, "input", input);
  check_shape(op, argument, tensor, shape);
}

struct LstmWeights {
  const at::Tensor& w_ih;                 // [4H, I]
  const at::Tensor& w_hh;                 // [4H, P]
  const std::optional<at::Tensor>& b_ih;  // [4H]
  const std::optional<at::Tensor>& b_hh;  // [4H]
  const std::optional<at::Tensor>& w_hr;  // [P, H]
};

// Checks everything but the batch of h and c; `input` has its dimension checked by the caller.
inline void check_lstm_arguments(const char* op, const at::Tensor& input, const at::Tensor& h,
                                 const at::Tensor& c, const LstmWeights& w) {
  check_device(op, "input", input);
  dtype_of(op, "input", input);
  check_dim(op, "h", h, 2);
  check_dim(op, "c", c, 2);
  const int64_t batch = h.size(0), hidden = c.size(1);
  const int64_t state = has(w.w_hr) ? h.size(1) : hidden;
  FUSED_CHECK_VALUE(hidden > 0, op, ": c must have a hidden size of at least 1, got ", c.sizes());
  check_like_input(op, "h", h, input, {batch, state});
  check_like_input(op, "c", c, input, {batch, hidden});
  check_like_input(op, "w_ih", w.w_ih, input, {4 * hidden, input.size(-1)});
  check_like_input(op, "w_hh", w.w_hh, input, {4 * hidden, state});
  if (has(w.b_ih)) check_like_input(op, "b_ih", *w.b_ih, input, {4 * hidden});
  if (has(w.b_hh)) check_like_input(op, "b_hh", *w.b_hh, input, {4 * hidden});
  if (has(w.w_hr)) check_like_input(op, "w_hr", *w.w_hr, input, {state, hidden});
  checked_int32(op, "batch", batch);
  checked_int32(op, "4 * hidden size", 4 * hidden);
}

inline void check_same_batch(const char* op, const at::Tensor& input, const at::Tensor& h) {
  FUSED_CHECK_VALUE(h.size(0) == input.size(0), op, ": h must have the batch of input (",
                    input.size(0), "), got ", h.sizes());
}

}  // namespace fused
