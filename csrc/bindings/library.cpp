// The same functions under torch.library, for torch.compile, torch.export and programs without
// Python: a list, nothing else. Fake kernels and derivatives are registered in Python, beside the
// functions that use them.
#include <torch/library.h>

#include "attention/attention_ops.h"

TORCH_LIBRARY(fused, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? rng, "
      "float dropout_p, bool is_causal, float? scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? attn_mask, Tensor? rng, float dropout_p, bool is_causal, "
      "float? scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}

namespace {

// One list for both devices: the functions themselves look at the tensors' device.
void implement(torch::Library& m) {
  m.impl("attention_forward", &fused::attention_forward);
  m.impl("attention_backward", &fused::attention_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(fused, CUDA, m) { implement(m); }
