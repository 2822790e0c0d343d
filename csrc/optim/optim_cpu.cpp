// Optimizer steps on the CPU: all tensors together are cut into chunks, and every thread takes a
// run of chunks. The loops themselves are in optim_cpu.inl, once per instruction set.
#include <vector>

#include "common/isa.h"
#include "optim/chunks_cpu.h"
#include "optim/optim_math.h"

#define FUSED_CPU_KERNELS "optim/optim_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {
namespace {

template <typename T>
void adam(const AdamParams& p) {
  using A = Accumulator<T>;
  // Tensors of a group nearly always share their step count: pow is called once, not per tensor.
  std::vector<AdamScales<A>> scales(p.num_tensors);
  double last_step = 0;
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const AdamTensor& t = p.tensors[i];
    const double step = read_step(t.step, t.step_is_double) + 1;
    write_step(t.step, t.step_is_double, step);
    scales[i] = i > 0 && step == last_step ? scales[i - 1] : adam_scales<A>(p, step);
    last_step = step;
  }
  for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    FUSED_ISA_DISPATCH(adam_chunk<T>, p, p.tensors[i], scales[i], begin, end);
  });
}

template <typename T>
void sgd(const SgdParams& p) {
  const auto scales = sgd_scales<Accumulator<T>>(p);
  for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    FUSED_ISA_DISPATCH(sgd_chunk<T>, p, p.tensors[i], scales, begin, end);
  });
}

}  // namespace

Status adam_cpu(const AdamParams& params) {
  if (step_is_skipped(params.gradients)) return nullptr;
  visit_dtype(params.dtype, [&](auto type) { adam<decltype(type)>(params); });
  return nullptr;
}

Status sgd_cpu(const SgdParams& params) {
  if (step_is_skipped(params.gradients)) return nullptr;
  visit_dtype(params.dtype, [&](auto type) { sgd<decltype(type)>(params); });
  return nullptr;
}

}  // namespace fused
