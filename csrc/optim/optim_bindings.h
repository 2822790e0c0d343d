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

// What a group's step finds in the state of each parameter.
struct StateNames {
  std::vector<PyObject*> states, scales;  // interned
  bool has_step;
  // A state that may be missing or None, and then begins: the momentum buffer.
  bool may_begin;
};

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// The arguments that every rule has, under Python's names; see StepOptions.
struct CommonArguments {
  StepOptions options;
  PyObject* master_name = nullptr;  // "master", "remainder" or none
  bool has_ema = false;

  CommonArguments(bool maximize, bool capturable, const std::optional<at::Tensor>& grad_scale,
                  const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& norm,
                  std::optional<double> max_norm, bool skip_nonfinite, bool zero_grad,
                  std::optional<double> ema_decay, const std::optional<at::Tensor>& rng,
                  const std::optional<std::string>& master) {
    options.maximize = maximize;
    options.capturable = capturable;
    options.grad_scale = grad_scale;
    options.found_inf = found_inf;
    options.norm = norm;
    options.max_norm = max_norm;
    options.skip_nonfinite = skip_nonfinite;
    options.zero_grad = zero_grad;
    options.ema_decay = ema_decay.value_or(0.0);
    options.rng = rng;
    has_ema = ema_decay.has_value();
    if (master) master_name = interned(master->c_str());
  }
};

using Outcome = std::optional<std::string>;

// A group's tensors, and whether every parameter with a gradient has its state.
struct Gathered {
  StepTensors tensors;
  bool initialised = true;
  const char* refusal = nullptr;

  Gathered(const py::list& params, const py::dict& state, const StateNames& names,
           const CommonArguments& common) {
    reserve(params.size(), names, common);
    StateWalker walker(state);
    refusal = for_each_gradient(
        params, [&](PyObject* object, const at::Tensor& param, const at::Tensor& grad) {
          tensors.params.push_back(param);
          tensors.grads.push_back(grad);
          return gather_state(walker.find(object), param, names, common);
        });
  }

 private:
  void reserve(size_t count, const StateNames& names, const CommonArguments& common) {
    tensors.params.reserve(count);
    tensors.grads.reserve(count);
    for (size_t k = 0; k < names.states.size(); ++k) tensors.states[k].reserve(count);
    if (names.has_step) tensors.steps.reserve(count);
    if (common.master_name) tensors.masters.reserve(count);
    if (common.has_ema) tensors.emas.reserve(count);
  }

  const char* gather_state(PyObject* entry, const at::Tensor& param, const StateNames& names,
                           const CommonArguments& common) {
    static PyObject* const step_name = interned("step");
    static PyObject* const ema_name = interned("ema");
    const bool has_master = common.master_name != nullptr && param.element_size() == 2;
    const bool needs_nothing =
        names.states.empty() && !names.has_step && !has_master && !common.has_ema;
    if (needs_nothing) {
      if (common.master_name) tensors.masters.emplace_back();
      return nullptr;
    }
    if (entry == nullptr || PyDict_GET_SIZE(entry) == 0 || begins(entry, names)) {
      initialised = false;
      return nullptr;
    }
    for (size_t k = 0; k < names.states.size(); ++k) {
      const at::Tensor& tensor =
          tensors.states[k].emplace_back(state_tensor(entry, names.states[k]));
      if (const char* reason =
              tensor.scalar_type() == at::kChar || tensor.scalar_type() == at::kByte
                  ? gather_scale(entry, names, k)
                  : fused::optim_bindings::refusal(tensor)) {
        return reason;
      }
    }
    if (names.has_step) tensors.steps.push_back(state_tensor(entry, step_name));
    if (common.master_name) {
      tensors.masters.push_back(has_master ? state_tensor(entry, common.master_name)
                                           : at::Tensor());
    }
    if (common.has_ema) tensors.emas.push_back(state_tensor(entry, ema_name));
    return nullptr;
  }

  static bool begins(PyObject* entry, const StateNames& names) {
    if (!names.may_begin || names.states.empty()) return false;
    PyObject* value = PyDict_GetItemWithError(entry, names.states[0]);
    return value == nullptr || value == Py_None;
  }

  // Lists of scales have an entry for every parameter once one has a scale.
  const char* gather_scale(PyObject* entry, const StateNames& names, size_t k) {
    tensors.scales[k].resize(tensors.states[k].size() - 1);
    tensors.scales[k].push_back(state_tensor(entry, names.scales[k]));
    return nullptr;
  }
};

// The gradients are checked before the caller makes states for them.
inline Outcome uninitialised(const char* op, const StepTensors& tensors) {
  check_gradients(op, tensors.params, tensors.grads);
  return "uninitialised";
}

inline void complete_scales(StepTensors& tensors) {
  for (auto& scales : tensors.scales) {
    if (!scales.empty()) scales.resize(tensors.params.size());
  }
}

// One step of a group, or a check that it would succeed. Returns None when that is done, else why
// it was not, with nothing changed: "uninitialised" where a parameter has no state yet, or what
// keeps the kernels from these tensors.
inline Outcome adam_group(const py::list& params, const py::dict& state, const py::handle& lr,
                          const py::handle& beta1, const py::handle& beta2, double weight_decay,
                          double eps, bool amsgrad, bool decoupled_weight_decay, bool maximize,
                          bool capturable, const std::optional<at::Tensor>& grad_scale,
                          const std::optional<at::Tensor>& found_inf,
                          const std::optional<at::Tensor>& norm, std::optional<double> max_norm,
                          bool skip_nonfinite, bool zero_grad, std::optional<double> ema_decay,
                          const std::optional<at::Tensor>& rng,
                          const std::optional<std::string>& master, bool check_only) {
  static const StateNames without_max{{interned("exp_avg"), interned("exp_avg_sq")},
                                      {interned("exp_avg_scale"), interned("exp_avg_sq_scale")},
                                      /*has_step=*/true,
                                      /*may_begin=*/false};
  static const StateNames with_max = [] {
    StateNames names = without_max;
    names.states.push_back(interned("max_exp_avg_sq"));
    names.scales.push_back(interned("max_exp_avg_sq_scale"));
    return names;
  }();
  const CommonArguments common(maximize, capturable, grad_scale, found_inf, norm, max_norm,
                               skip_nonfinite, zero_grad, ema_decay, rng, master);
  const Number lr_number(lr), beta1_number(beta1), beta2_number(beta2);
  Gathered group(params, state, amsgrad ? with_max : without_max, common);
  if (group.refusal) return group.refusal;
  if (!group.initialised) return uninitialised("adam", group.tensors);
  complete_scales(group.tensors);
  const AdamOptions options{common.options,
                            lr_number.value,
                            beta1_number.value,
                            beta2_number.value,
                            weight_decay,
                            eps,
                            amsgrad,
                            decoupled_weight_decay,
                            lr_number.tensor,
                            beta1_number.tensor,
                            beta2_number.tensor};
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::adam_", c10::ArrayRef<const c10::IValue>{});
  adam_step(group.tensors, options, check_only);
  return std::nullopt;
}

// `first_step`: the momentum buffers are there and hold nothing yet.
inline Outcome sgd_group(const py::list& params, const py::dict& state, const py::handle& lr,
                         double weight_decay, double momentum, double dampening, bool nesterov,
                         bool first_step, bool maximize, bool capturable,
                         const std::optional<at::Tensor>& grad_scale,
                         const std::optional<at::Tensor>& found_inf,
                         const std::optional<at::Tensor>& norm, std::optional<double> max_norm,
                         bool skip_nonfinite, bool zero_grad, std::optional<double> ema_decay,
                         const std::optional<at::Tensor>& rng,
                         const std::optional<std::string>& master, bool check_only) {
  static const StateNames without_momentum{{}, {}, /*has_step=*/false, /*may_begin=*/false};
  static const StateNames with_momentum{{interned("momentum_buffer")},
                                        {interned("momentum_buffer_scale")},
                                        /*has_step=*/false,
                                        /*may_begin=*/true};
  const CommonArguments common(maximize, capturable, grad_scale, found_inf, norm, max_norm,
                               skip_nonfinite, zero_grad, ema_decay, rng, master);
  const Number lr_number(lr);
  Gathered group(params, state, momentum != 0 ? with_momentum : without_momentum, common);
  if (group.refusal) return group.refusal;
  if (!group.initialised) return uninitialised("sgd", group.tensors);
  complete_scales(group.tensors);
  const SgdOptions options{common.options, lr_number.value, weight_decay, momentum,
                           dampening,      nesterov,        first_step,   lr_number.tensor};
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::sgd_", c10::ArrayRef<const c10::IValue>{});
  sgd_step(group.tensors, options, check_only);
  return std::nullopt;
}

using Tensors = std::vector<at::Tensor>;

inline at::Tensor bound_total_norm(const Tensors& tensors,
                                   const std::optional<at::Tensor>& grad_scale) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::total_norm", c10::ArrayRef<const c10::IValue>{});
  return total_norm(tensors, grad_scale);
}

// The norm of the gradients of all parameters in `groups`, a list of lists.
inline at::Tensor gradient_norm(const py::list& groups,
                                const std::optional<at::Tensor>& grad_scale) {
  Tensors grads;
  for (const py::handle& group : groups) {
    for (const py::handle& object : py::reinterpret_borrow<py::list>(group)) {
      const at::Tensor& grad = THPVariable_Unpack(object.ptr()).grad();
      if (grad.defined()) grads.push_back(grad);
    }
  }
  return bound_total_norm(grads, grad_scale);
}

inline void bound_clip_by_norm(const Tensors& tensors, const at::Tensor& norm, double max_norm) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::clip_by_norm_", c10::ArrayRef<const c10::IValue>{});
  clip_by_norm_(tensors, norm, max_norm);
}

inline void bind(py::module_& module) {
  using py::arg;
  module.def("total_norm", &bound_total_norm, arg("tensors"), arg("grad_scale") = py::none());
  module.def("gradient_norm", &gradient_norm, arg("groups"), arg("grad_scale"));
  module.def("clip_by_norm_", &bound_clip_by_norm, arg("tensors"), arg("norm"), arg("max_norm"));
  module.def("adam_group", &adam_group, arg("params"), arg("state"), arg("lr"), arg("beta1"),
             arg("beta2"), arg("weight_decay"), arg("eps"), arg("amsgrad"),
             arg("decoupled_weight_decay"), arg("maximize"), arg("capturable"), arg("grad_scale"),
             arg("found_inf"), arg("norm"), arg("max_norm"), arg("skip_nonfinite"),
             arg("zero_grad"), arg("ema_decay"), arg("rng"), arg("master"), arg("check_only"));
  module.def("sgd_group", &sgd_group, arg("params"), arg("state"), arg("lr"), arg("weight_decay"),
             arg("momentum"), arg("dampening"), arg("nesterov"), arg("first_step"), arg("maximize"),
             arg("capturable"), arg("grad_scale"), arg("found_inf"), arg("norm"), arg("max_norm"),
             arg("skip_nonfinite"), arg("zero_grad"), arg("ema_decay"), arg("rng"), arg("master"),
             arg("check_only"));
}

}  // namespace fused::optim_bindings
