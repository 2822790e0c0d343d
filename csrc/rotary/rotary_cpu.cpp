#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "rotary/rotary.h"

#define FUSED_CPU_KERNELS "rotary/rotary_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {
namespace {

// Starting a second thread costs about what so many elements do.
constexpr int64_t kElementsPerThread = 16384;

}  // namespace

Status rotary_cpu(const RotaryParams& p) {
  const int64_t row_elements = int64_t{p.head_dim} * (p.q.num_heads + int64_t{p.k.num_heads});
  const int64_t rows = int64_t{p.batch} * p.seqlen;
  parallel_for(0, rows, kElementsPerThread / row_elements + 1,
               [&](int64_t begin, int64_t end) { FUSED_ISA_DISPATCH(rotary_rows, p, begin, end); });
  return nullptr;
}

}  // namespace fused
