// The glue of attention in forward mode: results and their tangents from one pass.
#include <ATen/ops/empty_like.h>

#include "attention/attention.h"
#include "attention/attention_glue.h"
#include "attention/attention_ops.h"
#include "common/dispatch.h"

namespace fused {

using namespace attention_glue;

namespace {

using MaybeTensor = std::optional<at::Tensor>;

// A tangent that is there, checked against what it is the tangent of.
MaybeTensor checked_tangent(const char* argument, const MaybeTensor& tangent, const char* of,
                            const MaybeTensor& primal) {
  if (!tangent) return tangent;
  FUSED_CHECK_VALUE(primal.has_value(), kOp, ": ", argument, " must come with ", of, ", got None");
  check_shape(kOp, argument, *tangent, primal->sizes());
  check_same_dtype(kOp, argument, *tangent, of, *primal);
  check_same_device(kOp, argument, *tangent, of, *primal);
  return tangent;
}

// Names an operand's tangent in the params, and returns what has to outlive them.
at::Tensor set_operand(const char* argument, const MaybeTensor& tangent, const char* of,
                       const at::Tensor& primal, const void*& data, HeadStrides& strides) {
  data = nullptr;
  if (!checked_tangent(argument, tangent, of, primal)) return at::Tensor();
  const at::Tensor rows = with_contiguous_rows(*tangent);
  data = rows.const_data_ptr();
  strides = head_strides(rows);
  return rows;
}

const void* head_tangent(const char* argument, const char* of, const MaybeTensor& primal,
                         MaybeTensor& tangent, const at::Tensor& q) {
  if (checked_tangent(argument, tangent, of, primal)) tangent = tangent->contiguous();
  return head_values(argument, tangent, q);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_tangent(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const MaybeTensor& attn_mask, const MaybeTensor& alibi_slopes, const MaybeTensor& sink,
    const MaybeTensor& rng, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
    double dropout_p, bool is_causal, std::optional<double> scale, double softcap,
    int64_t window_left, int64_t window_right, const MaybeTensor& q_tangent,
    const MaybeTensor& k_tangent, const MaybeTensor& v_tangent,
    const MaybeTensor& attn_mask_tangent, const MaybeTensor& alibi_slopes_tangent,
    const MaybeTensor& sink_tangent) {
  check_operands(q_in, k_in, v_in, cu_seqlens_q.has_value());
  const c10::DeviceGuard guard(q_in.device());
  const at::Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in),
                   v = with_contiguous_rows(v_in);
  AttentionTangentParams params{};
  fill_problem(params, q, k, v,
               {attn_mask, alibi_slopes, sink, rng, cu_seqlens_q, cu_seqlens_k, dropout_p,
                is_causal, scale, softcap, window_left, window_right});

  AttentionProblem& tangents = params.tangents;
  tangents = params;
  tangents.softcap = scalar(0);
  tangents.mask = {};
  const at::Tensor of_q =
      set_operand("q_tangent", q_tangent, "q", q_in, tangents.q, tangents.q_strides);
  const at::Tensor of_k =
      set_operand("k_tangent", k_tangent, "k", k_in, tangents.k, tangents.k_strides);
  const at::Tensor of_v =
      set_operand("v_tangent", v_tangent, "v", v_in, tangents.v, tangents.v_strides);
  if (checked_tangent("attn_mask_tangent", attn_mask_tangent, "attn_mask", attn_mask)) {
    FUSED_CHECK_TYPE(params.mask.kind == MaskKind::kAdditive, kOp,
                     ": attn_mask_tangent must come with a floating attn_mask, got ",
                     attn_mask->scalar_type());
    tangents.mask = make_mask(*attn_mask_tangent, q, params, cu_seqlens_q.has_value());
  }
  MaybeTensor of_slopes = alibi_slopes_tangent, of_sink = sink_tangent;
  tangents.maybe_alibi_slopes =
      head_tangent("alibi_slopes_tangent", "alibi_slopes", alibi_slopes, of_slopes, q);
  tangents.maybe_sink = head_tangent("sink_tangent", "sink", sink, of_sink, q);

  const Results results = make_results(params, q, v.size(-1), false);
  const at::Tensor out_tangent = empty_heads(q, v.size(-1)),
                   lse_tangent = at::empty_like(results.lse);
  params.out_tangent = out_tangent.mutable_data_ptr();
  params.lse_tangent = lse_tangent.mutable_data_ptr();
  params.out_tangent_strides = head_strides(out_tangent);
  if (lse_tangent.numel() > 0) check_status(kOp, FUSED_DISPATCH(q, attention_tangent, params));
  return {results.out, results.lse, results.row_stats, out_tangent, lse_tangent};
}

}  // namespace fused
