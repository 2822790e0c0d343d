// The table of a step's tensors in device memory, for more of them than fit a launch's arguments.
// No torch in here.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace fused {

struct OptimCommon;

// Good for as long as the tensors stay where they are.
struct DeviceTable {
  void** words;            // columns as tensor_table.cuh has them, [num_tensors] each
  int32_t* chunk_tensors;  // [num_chunks]: of which tensor a chunk is
  int64_t num_tensors, num_chunks;
};

// Whether one launch that reads such a table takes the place of several that carry theirs.
bool device_table_pays(const OptimCommon& common);

int64_t device_table_bytes(const OptimCommon& common);

// How such a table lies in `memory`, and its contents, which small launches carry: nothing is
// copied from host memory that would have to stay as it is.
Status write_device_table_cuda(const OptimCommon& common, void* memory, DeviceTable& table,
                               Stream stream);

}  // namespace fused
