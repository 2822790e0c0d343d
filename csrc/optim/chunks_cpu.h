// All chunks of many tensors, spread over the CPU's threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "optim/chunks.h"

namespace fused {

// Below this many elements in all, waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// Calls f(tensor_index, begin, end, first_chunk) for runs of whole chunks that cover every tensor,
// on all threads; `first_chunk` is the number of the run's first chunk among those of all tensors.
template <typename Tensor, typename F>
void for_each_chunk(const Tensor* tensors, int64_t num_tensors, const F& f) {
  std::vector<int64_t> chunk_ends(num_tensors);
  int64_t count = 0, num_elements = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    count += num_chunks(tensors[i].numel);
    num_elements += tensors[i].numel;
    chunk_ends[i] = count;
  }
  const int64_t grain = num_elements < kSerialElements
                            ? std::max<int64_t>(count, 1)
                            : std::max<int64_t>(1, count * (kSerialElements / 2) / num_elements);
  parallel_for(0, count, grain, [&](int64_t chunk, int64_t last_chunk) {
    int64_t i = std::upper_bound(chunk_ends.begin(), chunk_ends.end(), chunk) - chunk_ends.begin();
    while (chunk < last_chunk) {
      // A tensor's consecutive chunks are one run.
      const int64_t first = i == 0 ? 0 : chunk_ends[i - 1];
      const int64_t stop = std::min(chunk_ends[i], last_chunk);
      f(i, (chunk - first) * kOptimChunk, std::min((stop - first) * kOptimChunk, tensors[i].numel),
        chunk);
      chunk = stop;
      ++i;
    }
  });
}

}  // namespace fused
