// The Python module fused._C: a list of the functions, nothing else.
#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>

#include "attention/attention_ops.h"
#include "common/isa.h"
#include "conv/conv_ops.h"
#include "lstm/lstm_ops.h"
#include "optim/optim_bindings.h"
#include "rotary/rotary_ops.h"
#if defined(FUSED_EMULATED)
#include "emulator/bindings.h"
#endif

namespace {

// What torch's dispatcher does for a registered operator: an argument that is the negative of what
// its memory holds (the imaginary part of a conjugate is), or a zero without memory, is made real.
template <typename T>
const T& materialize(const T& argument) {
  return argument;
}
at::Tensor materialize(const at::Tensor& tensor) {
  if (tensor._is_zerotensor()) return at::zeros(tensor.sizes(), tensor.options());
  return tensor.resolve_neg();
}
std::optional<at::Tensor> materialize(const std::optional<at::Tensor>& maybe_tensor) {
  return maybe_tensor ? std::optional(materialize(*maybe_tensor)) : std::nullopt;
}

// Binds `function` so that it runs without the GIL and shows up in torch.profiler as fused::<name>.
// The caller holds the arguments.
template <typename Result, typename... Args>
void bind(pybind11::module_& m, const char* name, Result (*function)(Args...)) {
  m.def(name, [function, label = std::string("fused::") + name](Args... args) {
    const pybind11::gil_scoped_release no_gil;
    RECORD_FUNCTION(label, c10::ArrayRef<const c10::IValue>{});
    return function(materialize(args)...);
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  bind(m, "attention_forward", &fused::attention_forward);
  bind(m, "attention_tangent", &fused::attention_tangent);
  bind(m, "attention_backward", &fused::attention_backward);
  bind(m, "attention_with_kv_cache", &fused::attention_with_kv_cache);
  bind(m, "conv_forward", &fused::conv_forward);
  bind(m, "conv_backward", &fused::conv_backward);
  bind(m, "lstm_cell_forward", &fused::lstm_cell_forward);
  bind(m, "lstm_cell_backward", &fused::lstm_cell_backward);
  bind(m, "lstm_layer_forward", &fused::lstm_layer_forward);
  bind(m, "lstm_layer_backward", &fused::lstm_layer_backward);
  bind(m, "rotary", &fused::rotary);

  fused::optim_bindings::bind(m);

  m.def("autocast_cast", [](const at::Tensor& tensor, at::ScalarType dtype) {
    return at::autocast::cached_cast(dtype, tensor, tensor.device().type());
  });
  m.def("isa", [] { return fused::isa_name(fused::current_isa()); });
#if defined(FUSED_EMULATED)
  fused::emulator::bind(m);
#endif
}
