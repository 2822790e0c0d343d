// The order in which a layer goes through its rows.
//
// Rows lie step after step in buffers [N, .], as in a PackedSequence: step t owns rows
// [begin, begin + rows), sequence b's row being begin + b. Batches shrink with t, so the sequences
// of a shorter step are the first ones of a longer step.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"

namespace fused {

struct LstmStep {
  int64_t begin, rows;
  // The first `continued` rows take their state from rows [previous, previous + continued), the
  // others from h0 and c0. In a reversed pass the longer, earlier steps come later: sequences join.
  int64_t previous, continued;
};

// The steps in the order of the forward pass.
inline std::vector<LstmStep> lstm_steps(const char* op, const at::Tensor& input, int64_t batch,
                                        const std::optional<at::Tensor>& batch_sizes,
                                        bool reverse) {
  std::vector<int64_t> rows;
  if (batch_sizes.has_value() && batch_sizes->defined()) {
    FUSED_CHECK_TYPE(batch_sizes->scalar_type() == at::kLong, op,
                     ": batch_sizes must be int64, got ", batch_sizes->scalar_type());
    FUSED_CHECK_VALUE(batch_sizes->is_cpu() && batch_sizes->dim() == 1, op,
                      ": batch_sizes must be one-dimensional on the CPU, got ",
                      batch_sizes->sizes(), " on ", batch_sizes->device());
    const at::Tensor sizes = batch_sizes->contiguous();
    rows.assign(sizes.const_data_ptr<int64_t>(), sizes.const_data_ptr<int64_t>() + sizes.numel());
  } else {
    rows.assign(input.size(0), batch);
  }

  std::vector<LstmStep> steps;
  steps.reserve(rows.size());
  int64_t begin = 0, longest = batch;
  for (const int64_t n : rows) {
    FUSED_CHECK_VALUE(0 <= n && n <= longest, op, ": batch_sizes must fall from h0's batch (",
                      batch, "), got ", n, " after ", longest);
    steps.push_back({begin, n, 0, 0});
    begin += n;
    longest = n;
  }
  if (batch_sizes.has_value() && batch_sizes->defined()) {
    FUSED_CHECK_VALUE(begin == input.size(0), op, ": batch_sizes must add up to input's rows (",
                      input.size(0), "), got ", begin);
  }
  if (reverse) std::reverse(steps.begin(), steps.end());
  for (size_t k = 1; k < steps.size(); ++k) {
    steps[k].previous = steps[k - 1].begin;
    steps[k].continued = std::min(steps[k].rows, steps[k - 1].rows);
  }
  return steps;
}

// Bounds of at most `parts` ranges of neighbouring rows of the batch that have about as many steps
// each: rows have different ones where the sequences have different lengths.
inline std::vector<int64_t> split_batch(const std::vector<LstmStep>& steps, int64_t batch,
                                        int64_t parts) {
  std::vector<int64_t> longer(batch + 1);  // [n]: the steps of n rows or more
  for (const LstmStep& step : steps) ++longer[step.rows];
  for (int64_t n = batch; n > 0; --n) longer[n - 1] += longer[n];
  int64_t total = 0, done = 0;
  for (const LstmStep& step : steps) total += step.rows;

  std::vector<int64_t> bounds{0};
  for (int64_t row = 0; row < batch && done < total; ++row) {
    done += longer[row + 1];
    if (done * parts >= total * static_cast<int64_t>(bounds.size())) bounds.push_back(row + 1);
  }
  if (bounds.size() == 1) bounds.push_back(batch);
  bounds.back() = batch;
  return bounds;
}

}  // namespace fused
