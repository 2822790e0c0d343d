// Tables of tensors in device memory (optim/device_table.h): written by launches that carry a piece
// of the table each, one block for each of its rows. That needs no pinned memory and no copy, and
// the stream orders it before the launches that read the table.
#include "optim/device_table.h"
#include "optim/optim_table.cuh"

namespace fused {
namespace {

constexpr int kColumns = OptimTable::kLeadingColumns + kOptimColumns;

__global__ void __launch_bounds__(kOptimThreads)
    write_table_kernel(const OptimTable piece, const DeviceTable table, int64_t first_row) {
  const int32_t i = blockIdx.x;
  const int64_t row = first_row + i;
  for (int column = threadIdx.x; column < kColumns; column += kOptimThreads) {
    table.words[column * table.num_tensors + row] = piece.words[column * piece.capacity + i];
  }
  const int64_t end = piece.chunk_end(i), begin = end - num_chunks(piece.numel(i));
  for (int64_t chunk = begin + threadIdx.x; chunk < end; chunk += kOptimThreads) {
    table.chunk_tensors[chunk] = static_cast<int32_t>(row);
  }
}

}  // namespace

bool device_table_pays(const OptimCommon& c) {
  // The most rows that a launch's arguments may hold, and the fewest.
  constexpr int64_t kFewest = OptimTable::kWords / kColumns;
  if (c.num_tensors <= kFewest) return false;
  const StepPlace place = place_of(c.tensors[0]);
  const bool one_place = std::all_of(c.tensors, c.tensors + c.num_tensors,
                                     [&](const OptimTensor& t) { return place_of(t) == place; });
  return one_place && c.num_tensors > make_table(c, c.tensors, c.num_tensors, place).capacity;
}

int64_t device_table_bytes(const OptimCommon& c) {
  const int64_t words = kColumns * c.num_tensors, chunks = num_chunks(c.tensors, c.num_tensors);
  return words * int64_t{sizeof(void*)} + chunks * int64_t{sizeof(int32_t)};
}

Status write_device_table_cuda(const OptimCommon& c, void* memory, DeviceTable& table,
                               Stream stream) {
  table.words = static_cast<void**>(memory);
  table.chunk_tensors = reinterpret_cast<int32_t*>(table.words + kColumns * c.num_tensors);
  table.num_tensors = c.num_tensors;
  table.num_chunks = num_chunks(c.tensors, c.num_tensors);
  bool all[kOptimColumns];
  std::fill(all, all + kOptimColumns, true);
  OptimTable piece(all);
  for (int64_t i = 0; i < c.num_tensors; ++i) {
    const OptimTensor& t = c.tensors[i];
    fill_row(piece, t, t.step_on_device ? t.maybe_step : nullptr);
    piece.push(t.numel);  // chunks go on from the piece before
    if (!piece.is_full() && i + 1 < c.num_tensors) continue;
    if (const Status failed =
            launch(write_table_kernel, dim3(piece.num_tensors), dim3(kOptimThreads), 0, stream,
                   piece, table, i + 1 - piece.num_tensors)) {
      return failed;
    }
    piece.num_tensors = 0;
  }
  return nullptr;
}

}  // namespace fused
