// The optimizers' Python binding: a whole parameter group goes in as its Python objects, and the
// tensors are gathered here, because a Python loop over them costs more than the step itself where
// they are many and small. A header, for bindings/module.cpp to include.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "optim/optim_ops.h"

namespace fused::optim_bindings {

namespace py = pybind11;

// Walks a group's parameters and their entries in the optimizer's state. State entries are mostly
// in the parameters' order, so the next one is looked at before a hash is computed (in Python, for
// tensors). Every object is looked at on every step: a tensor that was replaced is simply found.
class StateWalker {
 public:
  explicit StateWalker(const py::dict& state) : state_(state) {}

  // The entry of `param`, borrowed, or null.
  PyObject* find(PyObject* param) {
    PyObject *key = nullptr, *value = nullptr;
    if (PyDict_Next(state_.ptr(), &position_, &key, &value) && key == param) return value;
    value = PyDict_GetItemWithError(state_.ptr(), param);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  const py::dict& state_;
  Py_ssize_t position_ = 0;
};

// Why a tensor cannot go to a kernel as it is, or null. Subclasses go through the dispatcher.
inline const char* refusal(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->key_set().has_any(c10::python_ks)) return "subclass";
  if (tensor.layout() != at::kStrided) return "sparse";
  if (!tensor.is_floating_point()) return "complex";
  if (tensor.unsafeGetTensorImpl()->key_set().has_any(c10::DispatchKeySet(
          {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
           c10::DispatchKey::Functionalize}))) {
    return "transform";
  }
  return nullptr;
}

// The tensor `entry[name]`.
inline const at::Tensor& state_tensor(PyObject* entry, PyObject* name) {
  PyObject* value = PyDict_GetItemWithError(entry, name);
  if (value == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
    throw py::error_already_set();
  }
  if (!THPVariable_Check(value)) {
    throw py::type_error("optimizer: state must hold tensors, got " +
                         std::string(Py_TYPE(value)->tp_name) + " for " +
                         py::str(name).cast<std::string>());
  }
  return THPVariable_Unpack(value);
}

// A hyperparameter as Python has it: a number or a tensor of one element.
struct Number {
  double value = 0;
  std::optional<at::Tensor> tensor;

  explicit Number(const py::handle& object) {
    if (THPVariable_Check(object.ptr())) {
      tensor = THPVariable_Unpack(object.ptr());
    } else {
      value = object.cast<double>();
    }
  }
};

// Calls visit(param_object, param, grad) for each parameter that has a gradient. Returns why the
// group cannot go to a kernel, or null.
template <typename Visit>
const char* for_each_gradient(const py::list& params, const Visit& visit) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return "mode";
  for (const py::handle& object : params) {
    const at::Tensor& param = THPVariable_Unpack(object.ptr());
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) continue;
    if (const char* reason = refusal(param)) return reason;
    if (const char* reason = refusal(grad)) return reason;
    if (const char* reason = visit(object.ptr(), param, grad)) return reason;
  }
  return nullptr;
}

using Outcome = std::optional<std::string>;

// One step of a group, or a check that it would succeed. Returns None when that is done, else why
// it was not, with nothing changed: "uninitialised" where a parameter has no state yet, or what
// keeps the kernels from these tensors.
inline Outcome adam_group(const py::list& params, const py::dict& state, const py::handle& lr,
                          const py::handle& beta1, const py::handle& beta2, double weight_decay,
                          double eps, bool amsgrad, bool maximize, bool decoupled_weight_decay,
                          bool capturable, const std::optional<at::Tensor>& grad_scale,
                          const std::optional<at::Tensor>& found_inf, bool check_only) {
  static PyObject* const step_name = PyUnicode_InternFromString("step");
  static PyObject* const exp_avg_name = PyUnicode_InternFromString("exp_avg");
  static PyObject* const exp_avg_sq_name = PyUnicode_InternFromString("exp_avg_sq");
  static PyObject* const max_exp_avg_sq_name = PyUnicode_InternFromString("max_exp_avg_sq");
  const Number lr_number(lr), beta1_number(beta1), beta2_number(beta2);
  std::vector<at::Tensor> with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps;
  for (auto* list : {&with_grad, &grads, &exp_avgs, &exp_avg_sqs, &steps}) {
    list->reserve(params.size());
  }
  StateWalker walker(state);
  bool initialised = true;
  const auto visit = [&](PyObject* object, const at::Tensor& param,
                         const at::Tensor& grad) -> const char* {
    with_grad.push_back(param);
    grads.push_back(grad);
    PyObject* entry = walker.find(object);
    if (entry == nullptr || PyDict_GET_SIZE(entry) == 0) {
      initialised = false;
      return nullptr;
    }
    exp_avgs.push_back(state_tensor(entry, exp_avg_name));
    exp_avg_sqs.push_back(state_tensor(entry, exp_avg_sq_name));
    steps.push_back(state_tensor(entry, step_name));
    if (amsgrad) max_exp_avg_sqs.push_back(state_tensor(entry, max_exp_avg_sq_name));
    const char* reason = refusal(exp_avgs.back());
    if (!reason) reason = refusal(exp_avg_sqs.back());
    if (!reason && amsgrad) reason = refusal(max_exp_avg_sqs.back());
    return reason;
  };
  if (const char* reason = for_each_gradient(params, visit)) return reason;
  if (!initialised) {
    // The gradients are checked before the caller makes state for them.
    check_gradients("adam", with_grad, grads);
    return "uninitialised";
  }
  const AdamOptions options{lr_number.value,
                            beta1_number.value,
                            beta2_number.value,
                            weight_decay,
                            eps,
                            amsgrad,
                            maximize,
                            decoupled_weight_decay,
                            capturable,
                            lr_number.tensor,
                            beta1_number.tensor,
                            beta2_number.tensor,
                            grad_scale,
                            found_inf};
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::adam_", c10::ArrayRef<const c10::IValue>{});
  adam_step(with_grad, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, options, check_only);
  return std::nullopt;
}

// "uninitialised" where a parameter has no momentum buffer yet: then the caller makes them, and
// says by sgd_lists which are new.
inline Outcome sgd_group(const py::list& params, const py::dict& state, const py::handle& lr,
                         double weight_decay, double momentum, double dampening, bool nesterov,
                         bool maximize, bool capturable,
                         const std::optional<at::Tensor>& grad_scale,
                         const std::optional<at::Tensor>& found_inf, bool check_only) {
  static PyObject* const buffer_name = PyUnicode_InternFromString("momentum_buffer");
  const Number lr_number(lr);
  StateWalker walker(state);
  std::vector<at::Tensor> with_grad, grads, begun, begun_grads, buffers;
  const auto visit = [&](PyObject* object, const at::Tensor& param,
                         const at::Tensor& grad) -> const char* {
    with_grad.push_back(param);
    grads.push_back(grad);
    PyObject* entry = momentum != 0 ? walker.find(object) : nullptr;
    PyObject* buffer = entry ? PyDict_GetItemWithError(entry, buffer_name) : nullptr;
    if (buffer == nullptr || buffer == Py_None) return nullptr;
    begun.push_back(param);
    begun_grads.push_back(grad);
    buffers.push_back(state_tensor(entry, buffer_name));
    return refusal(buffers.back());
  };
  if (const char* reason = for_each_gradient(params, visit)) return reason;
  const SgdOptions options{
      lr_number.value,      weight_decay, momentum,         dampening,  nesterov, maximize,
      /*first_step=*/false, capturable,   lr_number.tensor, grad_scale, found_inf};
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::sgd_", c10::ArrayRef<const c10::IValue>{});
  if (momentum != 0 && begun.size() < with_grad.size()) {
    check_gradients("sgd", with_grad, grads);
    sgd_step(begun, begun_grads, buffers, options, /*check_only=*/true);
    return "uninitialised";
  }
  sgd_step(with_grad, grads, buffers, options, check_only);
  return std::nullopt;
}

using Tensors = std::vector<at::Tensor>;

inline void sgd_lists(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
                      const py::handle& lr, double weight_decay, double momentum, double dampening,
                      bool nesterov, bool maximize, bool first_step, bool capturable,
                      const std::optional<at::Tensor>& grad_scale,
                      const std::optional<at::Tensor>& found_inf) {
  const Number lr_number(lr);
  const SgdOptions options{lr_number.value,  weight_decay, momentum,   dampening,
                           nesterov,         maximize,     first_step, capturable,
                           lr_number.tensor, grad_scale,   found_inf};
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::sgd_", c10::ArrayRef<const c10::IValue>{});
  sgd_step(params, grads, momentum_buffers, options, /*check_only=*/false);
}

inline at::Tensor bound_total_norm(const Tensors& tensors,
                                   const std::optional<at::Tensor>& grad_scale) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::total_norm", c10::ArrayRef<const c10::IValue>{});
  return total_norm(tensors, grad_scale);
}

inline void bound_clip_by_norm(const Tensors& tensors, const at::Tensor& norm, double max_norm) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::clip_by_norm_", c10::ArrayRef<const c10::IValue>{});
  clip_by_norm_(tensors, norm, max_norm);
}

inline void bind(py::module_& module) {
  using py::arg;
  module.def("total_norm", &bound_total_norm, arg("tensors"), arg("grad_scale") = py::none());
  module.def("clip_by_norm_", &bound_clip_by_norm, arg("tensors"), arg("norm"), arg("max_norm"));
  module.def("adam_group", &adam_group, arg("params"), arg("state"), arg("lr"), arg("beta1"),
             arg("beta2"), arg("weight_decay"), arg("eps"), arg("amsgrad"), arg("maximize"),
             arg("decoupled_weight_decay"), arg("capturable"), arg("grad_scale"), arg("found_inf"),
             arg("check_only"));
  module.def("sgd_group", &sgd_group, arg("params"), arg("state"), arg("lr"), arg("weight_decay"),
             arg("momentum"), arg("dampening"), arg("nesterov"), arg("maximize"), arg("capturable"),
             arg("grad_scale"), arg("found_inf"), arg("check_only"));
  module.def("sgd_lists", &sgd_lists, arg("params"), arg("grads"), arg("momentum_buffers"),
             arg("lr"), arg("weight_decay"), arg("momentum"), arg("dampening"), arg("nesterov"),
             arg("maximize"), arg("first_step"), arg("capturable"), arg("grad_scale"),
             arg("found_inf"));
}

}  // namespace fused::optim_bindings
