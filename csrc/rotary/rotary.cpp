// The glue of rotary embedding: checks, allocates, fills the params and picks the backend.
#include "rotary/rotary.h"

#include "attention/attention_glue.h"
#include "common/dispatch.h"
#include "rotary/rotary_ops.h"

namespace fused {
namespace {

using attention_glue::compute_dtype;
using attention_glue::empty_heads;
using attention_glue::head_strides;
using attention_glue::with_contiguous_rows;

constexpr const char* kOp = "rotary";

void check_operands(const at::Tensor& q, const at::Tensor& k) {
  check_device(kOp, "q", q);
  check_dim(kOp, "q", q, 4);
  dtype_of(kOp, "q", q);
  check_dim(kOp, "k", k, 4);
  check_same_device(kOp, "k", k, "q", q);
  check_same_dtype(kOp, "k", k, "q", q);
  const bool same = k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3);
  FUSED_CHECK_VALUE(same, kOp, ": k must have the batch, length and head_dim of q (", q.sizes(),
                    "), got ", k.sizes());
  checked_int32(kOp, "batch times length", q.size(0) * q.size(2));
  const int64_t place = (q.size(1) + k.size(1)) * q.size(3);
  FUSED_CHECK_NOT_IMPLEMENTED(place <= kMaxRotaryPlace, kOp,
                              ": heads times head_dim must be at most ", kMaxRotaryPlace, ", got ",
                              place);
}

void check_table(const char* argument, const at::Tensor& table, const at::Tensor& q) {
  dtype_of(kOp, argument, table);
  check_same_device(kOp, argument, table, "q", q);
  const bool has_shape = (table.dim() == 2 || (table.dim() == 3 && table.size(0) == q.size(0))) &&
                         table.size(-2) == q.size(2) && 2 * table.size(-1) <= q.size(3);
  FUSED_CHECK_VALUE(has_shape, kOp, ": ", argument,
                    " must have the length and at most half the head_dim of q (", q.sizes(),
                    "), and its batch or none, got ", table.sizes());
}

RotaryOperand operand(const at::Tensor& in, const at::Tensor& out) {
  return {in.const_data_ptr(), out.mutable_data_ptr(), head_strides(in), head_strides(out),
          static_cast<int32_t>(in.size(1))};
}

RotaryTable table_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.dim() == 3 ? tensor.stride(0) : 0, tensor.stride(-2)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& q_in, const at::Tensor& k_in,
                                          const at::Tensor& cos_in, const at::Tensor& sin_in,
                                          bool interleaved, bool inverse) {
  check_operands(q_in, k_in);
  check_table("cos", cos_in, q_in);
  check_table("sin", sin_in, q_in);
  FUSED_CHECK_VALUE(sin_in.sizes() == cos_in.sizes(), kOp, ": sin must have the shape of cos (",
                    cos_in.sizes(), "), got ", sin_in.sizes());
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in);
  const bool as_is =
      cos_in.scalar_type() == q.scalar_type() && sin_in.scalar_type() == q.scalar_type();
  const at::ScalarType table_type = as_is ? q.scalar_type() : compute_dtype(q);
  const at::Tensor cos = with_contiguous_rows(cos_in.to(table_type));
  const at::Tensor sin = with_contiguous_rows(sin_in.to(table_type));

  at::Tensor out_q = empty_heads(q, q.size(3)), out_k = empty_heads(k, k.size(3));
  if (out_q.numel() + out_k.numel() > 0) {
    const RotaryParams params = {operand(q, out_q),
                                 operand(k, out_k),
                                 table_of(cos),
                                 table_of(sin),
                                 static_cast<int32_t>(q.size(0)),
                                 static_cast<int32_t>(q.size(2)),
                                 static_cast<int32_t>(q.size(3)),
                                 static_cast<int32_t>(cos.size(-1)),
                                 interleaved,
                                 inverse,
                                 dtype_of(kOp, "q", q),
                                 dtype_of(kOp, "cos", cos)};
    check_status(kOp, FUSED_DISPATCH(q, rotary, params));
  }
  return {out_q, out_k};
}

}  // namespace fused
