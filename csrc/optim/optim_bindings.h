// The optimizers' Python binding: a whole parameter group goes in as its Python objects. A header,
// for bindings/module.cpp to include.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "optim/gather.h"
#include "optim/kept_step.h"
#include "optim/optim_ops.h"

#if defined(FUSED_EMULATED)
#include "emulator/capture.h"
#endif

namespace fused::optim_bindings {

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

using Outcome = std::optional<std::string>;

// Whether a dispatch mode must see the registered op; one that captures emulated kernels need not.
inline bool is_watched() {
  using Modes = c10::impl::TorchDispatchModeTLS;
#if defined(FUSED_EMULATED)
  if (emulator::is_capturing()) return Modes::stack_len() > 1;
#endif
  return Modes::any_modes_set();
}

// What a group's step has kept, and for what it was asked.
struct KeptGroup {
  struct Purpose {
    const StateNames* names = nullptr;
    const PyObject* master_name = nullptr;
    bool has_ema = false, capturable = false, writes_grads = false;

    bool operator==(const Purpose& o) const {
      return names == o.names && master_name == o.master_name && has_ema == o.has_ema &&
             capturable == o.capturable && writes_grads == o.writes_grads;
    }
  };
  Purpose purpose;
  KeptStep step;
};

// What an optimizer's groups have kept, by their lists of parameters. Which list it was only says
// where to look: the step itself compares.
class KeptGroups {
 public:
  // Taken out until a step is made, while other code may run.
  class Loan {
   public:
    Loan(std::shared_ptr<KeptGroups> owner, const PyObject* params)
        : owner_(std::move(owner)), params_(params) {
      owner_->most_ = std::max(owner_->most_, 2 * ++owner_->num_lent_);
      std::swap(group_, owner_->groups_[params]);
      if (!group_) group_ = std::make_unique<KeptGroup>();
    }
    ~Loan() {
      if (!owner_) return;  // moved from
      --owner_->num_lent_;
      if (owner_->groups_.size() > owner_->most_) owner_->groups_.clear();
      owner_->groups_[params_] = std::move(group_);
    }
    Loan(Loan&&) = default;
    KeptGroup* operator->() const { return group_.get(); }

   private:
    std::shared_ptr<KeptGroups> owner_;
    const PyObject* params_;
    std::unique_ptr<KeptGroup> group_;
  };

  // How often a group was gathered because nothing was kept of it, or something else.
  int64_t num_gatherings() const { return num_gatherings_; }
  void count_gathering() { ++num_gatherings_; }

 private:
  // Of more lists than this some are no more, and all are forgotten. A step of many groups borrows
  // what they have kept all at once, and twice that many may stay.
  size_t most_ = 1024;
  size_t num_lent_ = 0;
  std::unordered_map<const PyObject*, std::unique_ptr<KeptGroup>> groups_;
  int64_t num_gatherings_ = 0;
};

// What a rule is called in errors and by the profiler.
struct RuleNames {
  const char *op, *event;
};

// Below this many elements a step is over before another thread would have got the interpreter.
constexpr int64_t kBriefStep = 1 << 18;

// A group's step that is ready, and what was kept for it.
class PlannedStep {
 public:
  using Walk = std::function<bool()>;

  PlannedStep(const RuleNames& names, KeptGroups::Loan kept)
      : names_(names), kept_(std::move(kept)) {}

  KeptGroup* kept() { return kept_.operator->(); }
  // `walk`: whether a kept step, which owns none of its tensors, still finds them. A gathered step
  // owns them and needs no walk.
  void set(std::unique_ptr<ReadyStep> step, bool is_brief, Walk walk) {
    step_ = std::move(step);
    is_brief_ = is_brief;
    walk_ = std::move(walk);
  }

  bool is_brief() const { return is_brief_; }
  bool is_as_planned() const { return !walk_ || walk_(); }
  // For as long as other threads may run.
  void hold() {
    if (walk_) held_ = kept_->step.hold();
  }

  void make() {
    if (!step_) return;
    std::optional<py::gil_scoped_release> no_gil;
    if (!is_brief_) no_gil.emplace();
    RECORD_FUNCTION(names_.event, c10::ArrayRef<const c10::IValue>{});
    step_->make();
  }

 private:
  RuleNames names_;
  KeptGroups::Loan kept_;
  Walk walk_;
  std::vector<at::Tensor> held_;
  std::unique_ptr<ReadyStep> step_;
  bool is_brief_ = false;
};

// The steps of several groups: all are made ready, which may fail and changes nothing, before the
// first is made.
class StepPlan {
 public:
  void add(PlannedStep step) { steps_.push_back(std::move(step)); }

  void make() {
    std::vector<PlannedStep> steps = std::move(steps_);
    bool all_brief = true;
    for (const PlannedStep& step : steps) {
      // To look again is cheaper than to hold thousands of small tensors.
      FUSED_CHECK_VALUE(step.is_as_planned(),
                        "optimizer: groups must stay as they are during a step, got a tensor that "
                        "was replaced meanwhile");
      all_brief &= step.is_brief();
    }
    for (PlannedStep& step : steps) {
      if (!all_brief) step.hold();
    }
    for (PlannedStep& step : steps) step.make();
  }

 private:
  std::vector<PlannedStep> steps_;
};

// Makes one step of a group, or adds it to `maybe_plan`, or checks that it would succeed. Returns
// None when that is done, else why it was not, with nothing changed: "uninitialised" where a
// parameter has no state yet, or what keeps the kernels from these tensors. The options say by
// which rule.
template <typename Options>
Outcome step_group(const RuleNames& rule, std::shared_ptr<KeptGroups> kept_groups,
                   const py::object& params_object, const py::dict& state, const StateNames& names,
                   const CommonArguments& common, const Options& rule_options, bool check_only,
                   StepPlan* maybe_plan) {
  if (is_watched()) return "mode";
  const StepOptions& options = common.options;
  const KeptGroup::Purpose purpose{&names, common.master_name, common.has_ema, options.capturable,
                                   options.writes_grads()};
  PlannedStep step(rule, KeptGroups::Loan(kept_groups, params_object.ptr()));
  const py::list params = listed(params_object);
  KeptGroup& kept = *step.kept();
  if (kept.purpose == purpose && !kept.step.may_be_skipped(options) &&
      is_as_kept(kept.step, params, state, names, common)) {
    const bool is_brief = kept.step.numel() < kBriefStep;
    PlannedStep::Walk walk;
    if (maybe_plan != nullptr || !is_brief) {
      walk = [&kept, &names, params, state, common] {
        return is_as_kept(kept.step, params, state, names, common);
      };
    }
    step.set(prepare(kept.step, rule_options, check_only), is_brief, std::move(walk));
    if (!check_only && maybe_plan == nullptr) step.hold();
  } else {
    kept_groups->count_gathering();
    Gathered group(params, state, names, common);
    if (group.refusal) return group.refusal;
    if (!group.initialised) {
      // The gradients are checked before the caller makes states for them.
      check_gradients(rule.op, group.tensors.params, group.tensors.grads);
      return "uninitialised";
    }
    kept.step.forget();  // what it was for is another now, whether this step fails or not
    kept.purpose = purpose;
    const py::gil_scoped_release no_gil;
    step.set(prepare(std::move(group.tensors), rule_options, check_only, &kept.step),
             /*is_brief=*/false, /*walk=*/{});
  }
  if (maybe_plan != nullptr) {
    maybe_plan->add(std::move(step));
  } else {
    step.make();
  }
  return std::nullopt;
}

inline Outcome adam_group(
    const std::shared_ptr<KeptGroups>& kept, const py::object& params, const py::dict& state,
    const py::handle& lr, const py::handle& beta1, const py::handle& beta2, double weight_decay,
    double eps, bool amsgrad, bool decoupled_weight_decay, bool maximize, bool capturable,
    const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf,
    const std::optional<at::Tensor>& norm, std::optional<double> max_norm, bool skip_nonfinite,
    bool zero_grad, std::optional<double> ema_decay, const std::optional<at::Tensor>& rng,
    const std::optional<std::string>& master, bool check_only, std::optional<StepPlan*> plan) {
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
  return step_group({"adam", "fused::adam_"}, kept, params, state, amsgrad ? with_max : without_max,
                    common, options, check_only, plan.value_or(nullptr));
}

// `first_step`: the momentum buffers are there and hold nothing yet.
inline Outcome sgd_group(
    const std::shared_ptr<KeptGroups>& kept, const py::object& params, const py::dict& state,
    const py::handle& lr, double weight_decay, double momentum, double dampening, bool nesterov,
    bool first_step, bool maximize, bool capturable, const std::optional<at::Tensor>& grad_scale,
    const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& norm,
    std::optional<double> max_norm, bool skip_nonfinite, bool zero_grad,
    std::optional<double> ema_decay, const std::optional<at::Tensor>& rng,
    const std::optional<std::string>& master, bool check_only, std::optional<StepPlan*> plan) {
  static const StateNames without_momentum{{}, {}, /*has_step=*/false, /*may_begin=*/false};
  static const StateNames with_momentum{{interned("momentum_buffer")},
                                        {interned("momentum_buffer_scale")},
                                        /*has_step=*/false,
                                        /*may_begin=*/true};
  const CommonArguments common(maximize, capturable, grad_scale, found_inf, norm, max_norm,
                               skip_nonfinite, zero_grad, ema_decay, rng, master);
  const Number lr_number(lr);
  const SgdOptions options{common.options, lr_number.value, weight_decay, momentum,
                           dampening,      nesterov,        first_step,   lr_number.tensor};
  return step_group({"sgd", "fused::sgd_"}, kept, params, state,
                    momentum != 0 ? with_momentum : without_momentum, common, options, check_only,
                    plan.value_or(nullptr));
}

using Tensors = std::vector<at::Tensor>;

inline at::Tensor bound_total_norm(const Tensors& tensors,
                                   const std::optional<at::Tensor>& grad_scale) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::total_norm", c10::ArrayRef<const c10::IValue>{});
  return total_norm(tensors, grad_scale);
}

// The norm of the gradients of all parameters in `groups`, a list of sequences.
inline at::Tensor gradient_norm(const py::list& groups,
                                const std::optional<at::Tensor>& grad_scale) {
  Tensors grads;
  for (const py::handle& group : groups) {
    for (const py::handle& object : listed(group)) {
      const at::Tensor& grad = gradient_of(parameter(object));
      if (grad.defined()) grads.push_back(grad);
    }
  }
  return bound_total_norm(grads, grad_scale);
}

// The same by what the groups' last steps have kept; None where they have not kept it all, or it
// has changed.
inline std::optional<at::Tensor> kept_gradient_norm(const std::shared_ptr<KeptGroups>& kept_groups,
                                                    const py::list& groups,
                                                    const std::optional<at::Tensor>& grad_scale) {
  if (is_watched()) return std::nullopt;
  std::vector<KeptGroups::Loan> loans;
  int64_t numel = 0;
  for (const py::handle& params : groups) {
    numel += loans.emplace_back(kept_groups, params.ptr())->step.numel();
  }
  const bool is_brief = numel < kBriefStep;
  NormBatches batches;
  Tensors held;
  for (size_t i = 0; i < loans.size(); ++i) {
    if (!add_kept_gradients(loans[i]->step, listed(groups[i]), batches,
                            is_brief ? nullptr : &held)) {
      return std::nullopt;
    }
  }
  if (batches.empty()) return std::nullopt;
  std::optional<py::gil_scoped_release> no_gil;
  if (!is_brief) no_gil.emplace();
  RECORD_FUNCTION("fused::total_norm", c10::ArrayRef<const c10::IValue>{});
  return total_norm(batches, grad_scale);
}

inline void bound_clip_by_norm(const Tensors& tensors, const at::Tensor& norm, double max_norm) {
  const py::gil_scoped_release no_gil;
  RECORD_FUNCTION("fused::clip_by_norm_", c10::ArrayRef<const c10::IValue>{});
  clip_by_norm_(tensors, norm, max_norm);
}

inline void bind(py::module_& module) {
  using py::arg;
  // The emulated twin of this module has a class of the same name.
  py::class_<KeptGroups, std::shared_ptr<KeptGroups>>(module, "KeptGroups", py::module_local())
      .def(py::init<>())
      .def_property_readonly("num_gatherings", &KeptGroups::num_gatherings);
  py::class_<StepPlan>(module, "StepPlan", py::module_local())
      .def(py::init<>())
      .def("make", &StepPlan::make);
  module.def("total_norm", &bound_total_norm, arg("tensors"), arg("grad_scale") = py::none());
  module.def("gradient_norm", &gradient_norm, arg("groups"), arg("grad_scale"));
  module.def("kept_gradient_norm", &kept_gradient_norm, arg("kept"), arg("groups"),
             arg("grad_scale"));
  module.def("clip_by_norm_", &bound_clip_by_norm, arg("tensors"), arg("norm"), arg("max_norm"));
  module.def("adam_group", &adam_group, arg("kept"), arg("params"), arg("state"), arg("lr"),
             arg("beta1"), arg("beta2"), arg("weight_decay"), arg("eps"), arg("amsgrad"),
             arg("decoupled_weight_decay"), arg("maximize"), arg("capturable"), arg("grad_scale"),
             arg("found_inf"), arg("norm"), arg("max_norm"), arg("skip_nonfinite"),
             arg("zero_grad"), arg("ema_decay"), arg("rng"), arg("master"), arg("check_only"),
             arg("plan"));
  module.def("sgd_group", &sgd_group, arg("kept"), arg("params"), arg("state"), arg("lr"),
             arg("weight_decay"), arg("momentum"), arg("dampening"), arg("nesterov"),
             arg("first_step"), arg("maximize"), arg("capturable"), arg("grad_scale"),
             arg("found_inf"), arg("norm"), arg("max_norm"), arg("skip_nonfinite"),
             arg("zero_grad"), arg("ema_decay"), arg("rng"), arg("master"), arg("check_only"),
             arg("plan"));
}

}  // namespace fused::optim_bindings
