// What a step's table of tensors has for each of them.
#pragma once

#include <algorithm>

#include "optim/optim_math.h"
#include "optim/tensor_table.cuh"

namespace fused {

enum OptimColumn {
  kParam,
  kGrad,
  kState0,
  kScale0 = kState0 + kMaxStates,
  kMaster = kScale0 + kMaxStates,
  kEma,
  kIndex,
  kStep,  // the bits of a double, or a pointer
  kOptimColumns
};
using OptimTable = TensorTable<kOptimColumns>;

// A table in device memory has all columns.
constexpr int8_t place_in_device_table(int column) {
  return static_cast<int8_t>(OptimTable::kLeadingColumns + column);
}

// Where a launch finds its tensors' step counts. kArgument: one count, of all of them.
enum class StepPlace : int8_t { kNone, kArgument, kTable, kDeviceFloat, kDeviceDouble };

inline StepPlace place_of(const OptimTensor& t) {
  if (t.maybe_step == nullptr) return StepPlace::kNone;
  if (!t.step_on_device) return StepPlace::kTable;
  return t.step_is_double ? StepPlace::kDeviceDouble : StepPlace::kDeviceFloat;
}

// What a count on the host will be after this step.
inline double next_host_step(const OptimTensor& t) {
  return read_step(t.maybe_step, t.step_is_double) + 1;
}

// A table without rows, of the columns that these tensors have.
inline OptimTable make_table(const OptimCommon& c, const OptimTensor* tensors, int64_t num_tensors,
                             StepPlace place) {
  bool present[kOptimColumns] = {};
  present[kParam] = present[kGrad] = true;
  for (int64_t i = 0; i < num_tensors; ++i) {  // an empty tensor has nothing anywhere
    for (int k = 0; k < kMaxStates; ++k) {
      present[kState0 + k] |= tensors[i].states[k] != nullptr;
      present[kScale0 + k] |= tensors[i].state_scales[k] != nullptr;
    }
    present[kMaster] |= tensors[i].maybe_master != nullptr;
    present[kEma] |= tensors[i].maybe_ema != nullptr;
  }
  present[kIndex] = c.maybe_rng != nullptr;
  present[kStep] = place != StepPlace::kNone;
  return OptimTable(present);
}

// Sets a row's columns; `step`: what it has in that of the counts.
inline void fill_row(OptimTable& table, const OptimTensor& t, void* step) {
  table.set(kParam, t.param);
  table.set(kGrad, t.grad);
  for (int k = 0; k < kMaxStates; ++k) {
    table.set(kState0 + k, t.states[k]);
    table.set(kScale0 + k, t.state_scales[k]);
  }
  table.set(kMaster, t.maybe_master);
  table.set(kEma, t.maybe_ema);
  table.set(kIndex, reinterpret_cast<void*>(t.index));
  table.set(kStep, step);
}

// The table in device memory as a launch's argument.
inline OptimTable table_outside(const DeviceTable& table) {
  int8_t places[kOptimColumns];
  for (int column = 0; column < kOptimColumns; ++column) {
    places[column] = place_in_device_table(column);
  }
  return OptimTable(table, places);
}

// Whether the launch can read that table: one number then says all counts that the host keeps.
inline bool uses_device_table(const OptimCommon& c) {
  if (c.device_table.words == nullptr) return false;
  if (place_of(c.tensors[0]) != StepPlace::kTable) return true;
  const double first = next_host_step(c.tensors[0]);
  return std::all_of(c.tensors + 1, c.tensors + c.num_tensors,
                     [&](const OptimTensor& t) { return next_host_step(t) == first; });
}

}  // namespace fused
