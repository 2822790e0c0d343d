// A step on the CPU, whatever its rule: every thread takes a run of chunks of all tensors together.
// Included once by each rule's *_cpu.cpp; the loops are in update_cpu.inl, once per instruction
// set.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/prefetch.h"
#include "optim/chunks_cpu.h"
#include "optim/optim_math.h"

namespace fused {

// One name for the types of a loop: FUSED_ISA_DISPATCH takes no commas.
template <typename R, typename T, typename S>
struct UpdateTypes {
  using Rule = R;
  using Param = T;
  using State = S;
  using Scales = typename R::template Scales<Accumulator<T>>;
};

}  // namespace fused

#define FUSED_CPU_KERNELS "optim/update_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {

static_assert(kOptimChunk % kQuantBlock == 0, "a chunk begins with a block");

inline void clear_gradients(const OptimCommon& c) {
  const auto clear = [&](auto type) {
    for_each_chunk(c.tensors, c.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      char* grad = static_cast<char*>(c.tensors[i].grad);
      memset(grad + begin * sizeof(type), 0, (end - begin) * sizeof(type));
    });
  };
  visit_dtype(c.dtype, clear);
}

// Tensors of a step nearly always share their count: powers are worked out once, not per tensor.
template <typename Rule, typename A>
std::vector<typename Rule::template Scales<A>> advance_all(const typename Rule::Params& p) {
  std::vector<typename Rule::template Scales<A>> scales(p.common.num_tensors);
  double last_step = 0;
  for (int64_t i = 0; i < p.common.num_tensors; ++i) {
    const OptimTensor& t = p.common.tensors[i];
    double step = 0;
    if (t.maybe_step != nullptr) {
      step = read_step(t.maybe_step, t.step_is_double) + 1;
      write_step(t.maybe_step, t.step_is_double, step);
    }
    scales[i] = i > 0 && step == last_step ? scales[i - 1] : Rule::template scales<A>(p, step);
    last_step = step;
  }
  return scales;
}

template <typename Rule>
Status update_cpu(const typename Rule::Params& p) {
  const OptimCommon& c = p.common;
  if (step_is_skipped(c)) {
    if (c.zero_grad) clear_gradients(c);
    return nullptr;
  }
  visit_types(c, [&](auto type, auto state_type) {
    using Types = UpdateTypes<Rule, decltype(type), decltype(state_type)>;
    const auto scales = advance_all<Rule, Accumulator<decltype(type)>>(p);
    for_each_chunk(c.tensors, c.num_tensors, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
      FUSED_ISA_DISPATCH(update_range<Types>, p, c.tensors[i], scales[i], begin, end);
    });
  });
  return nullptr;
}

}  // namespace fused
