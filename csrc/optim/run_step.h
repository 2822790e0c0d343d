// A step of a group, whatever its rule: checks everything, gathers and allocates, then launches
// once per kind of tensor. What a rule says of itself is a type with
//
//   Options, Params      what the step is given, and what its kernels take
//   kOp                  its name in errors
//   check_numbers        throws for a hyperparameter that cannot be read
//   check_tensors        throws for tensors that do not fit together
//   fill                 sets the rule's own part of Params
//   start                launches
#pragma once

#include <c10/util/irange.h>

#include <memory>
#include <utility>
#include <vector>

#include "optim/kept_step.h"
#include "optim/optim_glue.h"

namespace fused {

// One launch for each batch. The batches' tensors must outlive it.
template <typename Rule>
class Launches {
 public:
  Launches(const std::vector<LaunchBatch>& batches, const typename Rule::Options& options) {
    launches_.reserve(batches.size());
    for (const LaunchBatch& batch : batches) {
      const c10::DeviceGuard guard(batch.kind.device());
      Launch& launch = launches_.emplace_back(batch.kind, options.common.capturable);
      launch.batch = &batch;
      launch.params.common = batch.common(Rule::kOp, options.common, launch.read);
      Rule::fill(options, launch.read, launch.params);
    }
  }

  void start() const {
    for (const Launch& launch : launches_) {
      const c10::DeviceGuard guard(launch.kind.device());
      // Looked for at the last moment: since the step was made ready, a walk may have seen a tensor
      // move.
      typename Rule::Params params = launch.params;
      params.common.device_table = launch.batch->table.find();
      check_status(Rule::kOp, Rule::start(launch.kind, params));
    }
  }

 private:
  struct Launch {
    TensorKind kind;
    const LaunchBatch* batch = nullptr;
    ScalarReader read;  // owns what the parameters point to
    typename Rule::Params params{};

    Launch(TensorKind kind, bool capturable) : kind(kind), read(kind.device(), capturable) {}
  };
  std::vector<Launch> launches_;
};

template <typename Rule>
class ReadyKeptStep final : public ReadyStep {
 public:
  ReadyKeptStep(const KeptStep& kept, const typename Rule::Options& options)
      : kept_(kept), launches_(kept.batches(), options) {}

  void make() override {
    kept_.bump_versions();
    launches_.start();
  }

 private:
  const KeptStep& kept_;
  const Launches<Rule> launches_;
};

template <typename Rule>
class ReadyGatheredStep final : public ReadyStep {
 public:
  ReadyGatheredStep(StepTensors tensors, const typename Rule::Options& options,
                    KeptStep* maybe_keep)
      : tensors_(std::move(tensors)),
        flat_(tensors_.params.size()),
        batches_(make_batches(flat_, tensors_, options.common)),
        launches_(batches_, options) {
    if (maybe_keep != nullptr && flat_.has_no_copies()) {
      maybe_keep->remember(tensors_, std::move(batches_), options.common);
    }
  }

  void make() override {
    flat_.fill();
    flat_.bump_versions();
    launches_.start();
    flat_.finish();
  }

 private:
  const StepTensors tensors_;
  FlatTensors flat_;
  std::vector<LaunchBatch> batches_;
  const Launches<Rule> launches_;
};

// Steps one after the other, and gradients to be cleared behind them.
class ReadySteps final : public ReadyStep {
 public:
  ReadySteps(std::vector<std::unique_ptr<ReadyStep>> steps, TensorVector cleared)
      : steps_(std::move(steps)), cleared_(std::move(cleared)) {}

  void make() override {
    for (const auto& step : steps_) step->make();
    clear_gradients(cleared_);
  }

 private:
  const std::vector<std::unique_ptr<ReadyStep>> steps_;
  const TensorVector cleared_;
};

template <typename Rule>
std::unique_ptr<ReadyStep> prepare_step(StepTensors tensors, const typename Rule::Options& options,
                                        bool check_only, KeptStep* maybe_keep) {
  const StepOptions& common = options.common;
  Rule::check_numbers(options);
  check_step_options(Rule::kOp, common);
  Rule::check_tensors(tensors, options);
  if (check_only || tensors.params.empty()) return nullptr;
  std::vector<std::unique_ptr<ReadyStep>> one_by_one;
  const bool is_skipped = host_sees_skip(tensors.steps, common);
  // Where two parameters share memory (one listed twice, overlapping views), one after the other.
  if (!is_skipped && !share_memory(tensors.params)) {
    return std::make_unique<ReadyGatheredStep<Rule>>(std::move(tensors), options, maybe_keep);
  }
  if (!is_skipped) {
    typename Rule::Options of_one = options;
    of_one.common.zero_grad = false;
    for (const auto i : c10::irange(tensors.params.size())) {
      one_by_one.push_back(
          std::make_unique<ReadyGatheredStep<Rule>>(tensors.at(i), of_one, nullptr));
    }
  }
  return std::make_unique<ReadySteps>(std::move(one_by_one),
                                      common.zero_grad ? std::move(tensors.grads) : TensorVector());
}

// The same for a kept step that a walk has found to be as it was.
template <typename Rule>
std::unique_ptr<ReadyStep> prepare_kept(KeptStep& kept, const typename Rule::Options& options,
                                        bool check_only) {
  Rule::check_numbers(options);
  check_step_options(Rule::kOp, options.common);
  if (check_only) return nullptr;
  kept.bring_tables();
  return std::make_unique<ReadyKeptStep<Rule>>(kept, options);
}

}  // namespace fused
