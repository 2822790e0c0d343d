#include "common/parallel.h"

#include <ATen/Parallel.h>

#ifndef _OPENMP
#error "at::parallel_for is a header template: without -fopenmp it would silently use one thread"
#endif

namespace fused {

void parallel_for_impl(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                       const void* context) {
  at::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(context, b, e); });
}

int num_threads() { return at::get_num_threads(); }

}  // namespace fused
