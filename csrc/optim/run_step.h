// A step of a group, whatever its rule: checks everything, gathers, launches once per kind of
// tensor. What a rule says of itself is a type with
//
//   Options, Params      what the step is given, and what its kernels take
//   kOp                  its name in errors
//   check_numbers        throws for a hyperparameter that cannot be read
//   check_tensors        throws for tensors that do not fit together
//   fill                 sets the rule's own part of Params
//   start                launches
#pragma once

#include <c10/util/irange.h>

#include <vector>

#include "optim/kept_step.h"
#include "optim/optim_glue.h"

namespace fused {

// Everything that may fail is done before bump_versions() is called, and that before the launches.
template <typename Rule, typename BumpVersions>
void start_batches(const std::vector<LaunchBatch>& batches, const typename Rule::Options& options,
                   const BumpVersions& bump_versions) {
  std::vector<typename Rule::Params> launches;
  std::vector<ScalarReader> readers;
  launches.reserve(batches.size());
  readers.reserve(batches.size());
  for (const LaunchBatch& batch : batches) {
    const c10::DeviceGuard guard(batch.kind.device());
    ScalarReader& read = readers.emplace_back(batch.kind.device(), options.common.capturable);
    typename Rule::Params& p = launches.emplace_back();
    p.common = batch.common(Rule::kOp, options.common, read);
    Rule::fill(options, read, p);
  }
  bump_versions();
  for (const auto i : c10::irange(batches.size())) {
    const c10::DeviceGuard guard(batches[i].kind.device());
    check_status(Rule::kOp, Rule::start(batches[i].kind, launches[i]));
  }
}

template <typename Rule>
void run_gathered(const StepTensors& tensors, const typename Rule::Options& options,
                  KeptStep* maybe_keep) {
  FlatTensors flat(tensors.params.size());
  std::vector<LaunchBatch> batches = make_batches(flat, tensors, options.common);
  start_batches<Rule>(batches, options, [&] { flat.bump_versions(); });
  flat.finish();
  if (maybe_keep != nullptr && flat.has_no_copies()) {
    maybe_keep->remember(tensors, std::move(batches), options.common);
  }
}

// `maybe_keep`: keeps the step where the next one can be made of what this one has gathered.
template <typename Rule>
void run_step(const StepTensors& tensors, const typename Rule::Options& options, bool check_only,
              KeptStep* maybe_keep) {
  const StepOptions& common = options.common;
  Rule::check_numbers(options);
  check_step_options(Rule::kOp, common);
  Rule::check_tensors(tensors, options);
  if (check_only || tensors.params.empty()) return;
  if (host_sees_skip(tensors.steps, common)) {
    if (common.zero_grad) clear_gradients(tensors.grads);
    return;
  }
  // Where two parameters or written gradients share memory (one listed twice, overlapping views),
  // one after the other.
  if (share_memory(tensors.params) || (common.zero_grad && share_memory(tensors.grads))) {
    typename Rule::Options one_by_one = options;
    one_by_one.common.zero_grad = false;
    for (const auto i : c10::irange(tensors.params.size())) {
      run_gathered<Rule>(tensors.at(i), one_by_one, nullptr);
    }
    if (common.zero_grad) clear_gradients(tensors.grads);
    return;
  }
  run_gathered<Rule>(tensors, options, maybe_keep);
}

// The same for a kept step that a walk has found to be as it was.
template <typename Rule>
void run_kept(const KeptStep& kept, const typename Rule::Options& options, bool check_only) {
  Rule::check_numbers(options);
  check_step_options(Rule::kOp, options.common);
  if (check_only) return;
  start_batches<Rule>(kept.batches(), options, [&] { kept.bump_versions(); });
}

}  // namespace fused
