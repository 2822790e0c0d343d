// The same functions under torch.library, for torch.compile, torch.export and programs without
// Python: a list, nothing else. Fake kernels and derivatives are registered in Python, beside the
// functions that use them.
#include <torch/library.h>

#include <string>

#include "attention/attention_ops.h"
#include "conv/conv_ops.h"
#include "lstm/lstm_ops.h"
#include "optim/optim_ops.h"
#include "rotary/rotary_ops.h"

TORCH_LIBRARY(fused, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, "
      "Tensor? sink, Tensor? rng, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float dropout_p, "
      "bool is_causal, float? scale, float softcap, SymInt window_left, SymInt window_right) -> "
      "(Tensor out, Tensor lse, Tensor row_stats)");
  m.def(
      "attention_tangent(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, "
      "Tensor? sink, Tensor? rng, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float dropout_p, "
      "bool is_causal, float? scale, float softcap, SymInt window_left, SymInt window_right, "
      "Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor? attn_mask_tangent, "
      "Tensor? alibi_slopes_tangent, Tensor? sink_tangent) -> "
      "(Tensor out, Tensor lse, Tensor row_stats, Tensor out_tangent, Tensor lse_tangent)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor row_stats, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sink, "
      "Tensor? rng, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "float dropout_p, bool is_causal, float? scale, float softcap, SymInt window_left, "
      "SymInt window_right, bool[6] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
      "Tensor grad_attn_mask, Tensor grad_alibi_slopes, Tensor grad_sink)");
  m.def(
      "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor cache_seqlens, Tensor? k, Tensor? v, Tensor? block_table, Tensor? attn_mask, "
      "Tensor? alibi_slopes, Tensor? sink, bool is_causal, float? scale, float softcap, "
      "SymInt window_left, SymInt window_right) -> (Tensor out, Tensor lse)");
  m.def(
      "lstm_cell_forward(Tensor input, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh) -> (Tensor h_next, Tensor c_next, Tensor gates)");
  m.def(
      "lstm_cell_backward(Tensor? grad_h_next, Tensor? grad_c_next, Tensor input, Tensor h, "
      "Tensor c, Tensor w_ih, Tensor w_hh, Tensor gates, bool[6] needs) -> "
      "(Tensor grad_input, Tensor grad_h, Tensor grad_c, Tensor grad_w_ih, Tensor grad_w_hh, "
      "Tensor grad_bias)");
  // Each for padded input, and for packed input, of which the host reads batch_sizes: a CUDA graph
  // would repeat the steps that it was recorded with, so Inductor has to leave the op out of it.
  const auto def_layer = [&m](const std::string& name, const std::string& arguments) {
    m.def((name + arguments).c_str());
    m.def((name + ".packed" + arguments).c_str(), {at::Tag::cudagraph_unsafe});
  };
  def_layer("lstm_layer_forward",
            "(Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, "
            "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, bool reverse) -> "
            "(Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)");
  def_layer(
      "lstm_layer_backward",
      "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? w_hr, Tensor? batch_sizes, "
      "bool reverse, Tensor output, Tensor gates, Tensor cells, Tensor hidden, bool[7] needs) -> "
      "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_w_ih, Tensor grad_w_hh, "
      "Tensor grad_bias, Tensor grad_w_hr)");
  m.def(
      "conv_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
      "SymInt[] dilation, SymInt groups, str? activation, bool save_pre) "
      "-> (Tensor output, Tensor pre)");
  m.def(
      "conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? saved, "
      "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str? activation, "
      "bool want_input, bool want_weight, bool want_bias) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> "
      "(Tensor out_q, Tensor out_k)");
  // What the steps share: see StepOptions and adam_op.
  const std::string common =
      "Tensor? tensor_lr=None, bool maximize=False, bool capturable=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor? norm=None, float? max_norm=None, "
      "bool skip_nonfinite=False, bool zero_grad=False, float ema_decay=0.0, Tensor? rng=None) "
      "-> ()";
  m.def(
      (std::string(
           "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
           "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, "
           "Tensor(g!)[] scales, Tensor(h!)[] masters, Tensor(i!)[] emas, *, float lr, float "
           "beta1, "
           "float beta2, float weight_decay, float eps, bool amsgrad, bool decoupled_weight_decay, "
           "Tensor? tensor_beta1=None, Tensor? tensor_beta2=None, ") +
       common)
          .c_str());
  m.def((std::string("sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, "
                     "Tensor(d!)[] scales, Tensor(e!)[] masters, Tensor(f!)[] emas, *, float lr, "
                     "float weight_decay, float momentum, float dampening, bool nesterov, bool "
                     "first_step, ") +
         common)
            .c_str());
  m.def("total_norm(Tensor[] tensors, Tensor? grad_scale=None) -> Tensor");
  m.def("clip_by_norm_(Tensor(a!)[] tensors, Tensor norm, float max_norm) -> ()");
}

namespace {

// One list for both devices: the functions themselves look at the tensors' device.
void implement(torch::Library& m) {
  m.impl("attention_forward", &fused::attention_forward);
  m.impl("attention_tangent", &fused::attention_tangent);
  m.impl("attention_backward", &fused::attention_backward);
  m.impl("attention_with_kv_cache", &fused::attention_with_kv_cache);
  m.impl("lstm_cell_forward", &fused::lstm_cell_forward);
  m.impl("lstm_cell_backward", &fused::lstm_cell_backward);
  m.impl("lstm_layer_forward", &fused::lstm_layer_forward);
  m.impl("lstm_layer_backward", &fused::lstm_layer_backward);
  m.impl("lstm_layer_forward.packed", &fused::lstm_layer_forward);
  m.impl("lstm_layer_backward.packed", &fused::lstm_layer_backward);
  m.impl("conv_forward", &fused::conv_forward);
  m.impl("conv_backward", &fused::conv_backward);
  m.impl("rotary", &fused::rotary);
  m.impl("adam_", &fused::adam_op);
  m.impl("sgd_", &fused::sgd_op);
  m.impl("total_norm", &fused::total_norm);
  m.impl("clip_by_norm_", &fused::clip_by_norm_);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(fused, CUDA, m) { implement(m); }
