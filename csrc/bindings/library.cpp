// The same functions under torch.library, for torch.compile, torch.export and programs without
// Python: a list, nothing else. Fake kernels and derivatives are registered in Python, beside the
// functions that use them.
#include <torch/library.h>

#include "attention/attention_ops.h"
#include "optim/optim_ops.h"

TORCH_LIBRARY(fused, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? rng, "
      "float dropout_p, bool is_causal, float? scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? attn_mask, Tensor? rng, float dropout_p, bool is_causal, "
      "float? scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "adam_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, "
      "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, *, float lr, "
      "float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, "
      "bool decoupled_weight_decay, bool capturable, Tensor? tensor_lr=None, "
      "Tensor? tensor_beta1=None, Tensor? tensor_beta2=None, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, float lr, "
      "float weight_decay, float momentum, float dampening, bool nesterov, bool maximize, "
      "bool first_step, bool capturable, Tensor? tensor_lr=None, Tensor? grad_scale=None, "
      "Tensor? found_inf=None) -> ()");
}

namespace {

// One list for both devices: the functions themselves look at the tensors' device.
void implement(torch::Library& m) {
  m.impl("attention_forward", &fused::attention_forward);
  m.impl("attention_backward", &fused::attention_backward);
  m.impl("adam_", &fused::adam_op);
  m.impl("sgd_", &fused::sgd_op);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(fused, CUDA, m) { implement(m); }
