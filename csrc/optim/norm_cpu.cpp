// Norms and clipping on the CPU: every thread takes a run of chunks of all tensors together. The
// loops themselves are in norm_cpu.inl, once per instruction set.
#include <cmath>

#include "common/isa.h"
#include "common/prefetch.h"
#include "optim/chunks_cpu.h"
#include "optim/norm.h"

#define FUSED_CPU_KERNELS "optim/norm_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

Status norm_partials_cpu(const NormPartialsParams& p) {
  visit_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t c) {
      const T* data = static_cast<const T*>(p.tensors[i].data);
      for (; begin < end; begin += kOptimChunk, ++c) {
        const int64_t numel = std::min(kOptimChunk, end - begin);
        p.partials[c] = FUSED_ISA_DISPATCH(sum_of_squares<T>, data + begin, numel, end - begin);
      }
    });
  });
  return nullptr;
}

Status norm_sum_cpu(const NormSumParams& p) {
  double sum = 0;
  for (int64_t i = 0; i < p.num_partials; ++i) sum += p.partials[i];
  *p.norm = std::sqrt(sum) / (p.maybe_grad_scale ? *p.maybe_grad_scale : 1.0f);
  return nullptr;
}

Status clip_cpu(const ClipParams& p) {
  const double coefficient = clip_coefficient(*p.norm, p.max_norm);
  if (coefficient == 1.0) return nullptr;
  visit_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto factor = static_cast<Accumulator<T>>(coefficient);
    for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      T* data = static_cast<T*>(p.tensors[i].data);
      FUSED_ISA_DISPATCH(multiply<T>, data + begin, end - begin, factor);
    });
  });
  return nullptr;
}

}  // namespace fused
