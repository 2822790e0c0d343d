// Threads for CPU kernels, on torch's own pool, so that torch.set_num_threads holds. CPU kernels
// include no torch header; parallel.cpp is the one place that does.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace fused {

using ParallelBody = void (*)(const void* context, int64_t begin, int64_t end);

void parallel_for_impl(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                       const void* context);

// Calls `f(chunk_begin, chunk_end)` for chunks of at least `grain` that cover [begin, end).
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  parallel_for_impl(
      begin, end, grain,
      [](const void* context, int64_t b, int64_t e) { (*static_cast<const F*>(context))(b, e); },
      &f);
}

int num_threads();

}  // namespace fused
