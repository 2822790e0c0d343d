// A group's tensors out of its Python objects: gathered here, because a Python loop over them costs
// more than the step itself where they are many and small.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "optim/kept_step.h"
#include "optim/optim_ops.h"

namespace fused::optim_bindings {

namespace py = pybind11;

// The parameters of a group, whatever sequence its user has made of them; itself where it is a
// list.
inline py::list listed(const py::handle& params) {
  return py::list(py::reinterpret_borrow<py::object>(params));
}

// One of a group's parameters, which users edit between steps: not assumed to be a tensor.
inline const at::Tensor& parameter(const py::handle& object) {
  if (!THPVariable_Check(object.ptr())) {
    throw py::type_error("optimizer: params must hold tensors, got " +
                         std::string(Py_TYPE(object.ptr())->tp_name));
  }
  return THPVariable_Unpack(object.ptr());
}

// The gradient of a leaf: Tensor::grad() asks first whether it is one, to warn.
inline const at::Tensor& gradient_of(const at::Tensor& param) {
  return param.unsafeGetTensorImpl()->grad();
}

// Looks up keys that are mostly asked for in the dict's own order: the next one is looked at before
// a hash is computed (in Python, for tensors).
class DictWalker {
 public:
  explicit DictWalker(PyObject* dict) : dict_(dict) {}

  // The value of `key`, borrowed, or null.
  PyObject* find(PyObject* key) {
    PyObject *next = nullptr, *value = nullptr;
    if (PyDict_Next(dict_, &position_, &next, &value) && next == key) return value;
    value = PyDict_GetItemWithError(dict_, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* dict_;
  Py_ssize_t position_ = 0;
};

// Why a tensor cannot go to a kernel as it is, or null. Subclasses go through the dispatcher.
inline const char* refusal(const at::Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->key_set().has_any(c10::python_ks)) return "subclass";
  if (tensor.layout() != at::kStrided) return "sparse";
  if (!tensor.is_floating_point()) return "complex";
  if (!tensor.is_cpu() && !tensor.is_cuda()) return "device";
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

// What a group's step finds in the state of each parameter.
struct StateNames {
  std::vector<PyObject*> states, scales;  // interned
  bool has_step;
  // A state that may be missing or None, and then begins: the momentum buffer.
  bool may_begin;
};

// A reference that is never given back: for names that are looked up for good.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// By which name a parameter's state holds its master.
inline PyObject* master_name(const std::string& name) {
  static PyObject* const master = interned("master");
  static PyObject* const remainder = interned("remainder");
  FUSED_CHECK_VALUE(name == "master" || name == "remainder",
                    "optimizer: master must be \"master\" or \"remainder\", got ", name);
  return name == "master" ? master : remainder;
}

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
    if (master) master_name = optim_bindings::master_name(*master);
  }
};

inline bool is_code(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kChar || tensor.scalar_type() == at::kByte;
}

inline bool has_master(const at::Tensor& param, const CommonArguments& common) {
  return common.master_name != nullptr && param.element_size() == 2;
}

// Whether a step reads nothing of a parameter but itself and its gradient.
inline bool needs_no_state(const at::Tensor& param, const StateNames& names,
                           const CommonArguments& common) {
  return names.states.empty() && !names.has_step && !has_master(param, common) && !common.has_ema;
}

inline PyObject* step_name() {
  static PyObject* const name = interned("step");
  return name;
}

inline PyObject* ema_name() {
  static PyObject* const name = interned("ema");
  return name;
}

// A group's tensors, and whether every parameter with a gradient has its state.
struct Gathered {
  StepTensors tensors;
  bool initialised = true;
  const char* refusal = nullptr;  // why the group cannot go to a kernel, or null

  Gathered(const py::list& params, const py::dict& state, const StateNames& names,
           const CommonArguments& common) {
    reserve(params.size(), names, common);
    DictWalker entries(state.ptr());
    for (const py::handle& object : params) {
      const at::Tensor& param = parameter(object);
      const at::Tensor& grad = gradient_of(param);
      if (!grad.defined()) continue;
      refusal = fused::optim_bindings::refusal(param);
      if (refusal == nullptr) refusal = fused::optim_bindings::refusal(grad);
      if (refusal != nullptr) return;
      tensors.params.push_back(param);
      tensors.grads.push_back(grad);
      refusal = gather_state(entries.find(object.ptr()), param, names, common);
      if (refusal != nullptr) return;
    }
    for (auto& scales : tensors.scales) {
      if (!scales.empty()) scales.resize(tensors.params.size());
    }
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
    if (needs_no_state(param, names, common)) {
      if (common.master_name) tensors.masters.emplace_back();
      return nullptr;
    }
    if (entry != nullptr && !PyDict_Check(entry)) {
      throw py::type_error("optimizer: state must hold a dict for each parameter, got " +
                           std::string(Py_TYPE(entry)->tp_name));
    }
    if (entry == nullptr || PyDict_GET_SIZE(entry) == 0 || begins(entry, names) ||
        lacks_copy(entry, param, common)) {
      initialised = false;
      return nullptr;
    }
    for (size_t k = 0; k < names.states.size(); ++k) {
      const at::Tensor& tensor =
          tensors.states[k].emplace_back(state_tensor(entry, names.states[k]));
      if (const char* reason = is_code(tensor) ? gather_scale(entry, names, k)
                                               : fused::optim_bindings::refusal(tensor)) {
        return reason;
      }
    }
    if (names.has_step) tensors.steps.push_back(state_tensor(entry, step_name()));
    if (common.master_name) {
      tensors.masters.push_back(has_master(param, common) ? state_tensor(entry, common.master_name)
                                                          : at::Tensor());
    }
    if (common.has_ema) tensors.emas.push_back(state_tensor(entry, ema_name()));
    return nullptr;
  }

  static bool begins(PyObject* entry, const StateNames& names) {
    if (!names.may_begin || names.states.empty()) return false;
    PyObject* value = PyDict_GetItemWithError(entry, names.states[0]);
    return value == nullptr || value == Py_None;
  }

  // Whether the master or the average of a state that was loaded has yet to be made.
  static bool lacks_copy(PyObject* entry, const at::Tensor& param, const CommonArguments& common) {
    const auto lacks = [entry](PyObject* name) { return PyDict_Contains(entry, name) == 0; };
    return (has_master(param, common) && lacks(common.master_name)) ||
           (common.has_ema && lacks(ema_name()));
  }

  // Lists of scales have an entry for every parameter once one has a scale.
  const char* gather_scale(PyObject* entry, const StateNames& names, size_t k) {
    tensors.scales[k].resize(tensors.states[k].size() - 1);
    tensors.scales[k].push_back(state_tensor(entry, names.scales[k]));
    return nullptr;
  }
};

// Whether all tensors of a group are what they were at the kept step.
inline bool is_as_kept(KeptStep& kept, const py::list& params, const py::dict& state,
                       const StateNames& names, const CommonArguments& common) {
  kept.begin_walk();
  DictWalker entries(state.ptr());
  for (const py::handle& object : params) {
    const at::Tensor& param = parameter(object);
    const at::Tensor& grad = gradient_of(param);
    if (!grad.defined()) continue;
    if (!kept.next_is(param) || !kept.next_is(grad)) return false;
    if (needs_no_state(param, names, common)) continue;
    PyObject* entry = entries.find(object.ptr());
    if (entry == nullptr || !PyDict_Check(entry)) return false;
    DictWalker values(entry);
    const at::Tensor* found = nullptr;
    const auto next_is = [&](PyObject* name) {
      PyObject* value = values.find(name);
      if (value == nullptr || !THPVariable_CheckExact(value)) return false;
      found = &THPVariable_Unpack(value);
      return kept.next_is(*found);
    };
    if (names.has_step && !next_is(step_name())) return false;
    for (size_t k = 0; k < names.states.size(); ++k) {
      if (!next_is(names.states[k])) return false;
      if (is_code(*found) && !next_is(names.scales[k])) return false;
    }
    if (has_master(param, common) && !next_is(common.master_name)) return false;
    if (common.has_ema && !next_is(ema_name())) return false;
  }
  return kept.end_walk();
}

// The same of the gradients alone, which are added to `batches`, and to `maybe_hold`.
inline bool add_kept_gradients(const KeptStep& kept, const py::list& params, NormBatches& batches,
                               TensorVector* maybe_hold) {
  KeptStep::GradientWalk walk(kept, batches);
  for (const py::handle& object : params) {
    const at::Tensor& grad = gradient_of(parameter(object));
    if (!grad.defined()) continue;
    if (!walk.next_is(grad)) return false;
    if (maybe_hold != nullptr) maybe_hold->push_back(grad);
  }
  return walk.end();
}

}  // namespace fused::optim_bindings
