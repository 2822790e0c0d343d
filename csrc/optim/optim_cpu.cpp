// Optimizer steps on the CPU: all tensors together are cut into chunks, and every thread takes a
// run of chunks. The loops themselves are in optim_cpu.inl, once per instruction set.
#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "optim/optim_math.h"

#define FUSED_CPU_KERNELS "optim/optim_cpu.inl"
#include "common/for_each_isa.inl"

namespace fused {
namespace {

// Elements a thread does between two looks at the tensor list: four arrays of 32 KB in float32,
// and a multiple of every vector width, so that only a tensor's last chunk has a remainder.
constexpr int64_t kChunk = 8192;

// Below this many elements in all, waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// Calls f(tensor_index, begin, end) for every chunk of every tensor, on all threads.
template <typename Tensor, typename F>
void for_each_chunk(const Tensor* tensors, int64_t num_tensors, const F& f) {
  std::vector<int64_t> chunk_ends(num_tensors);
  int64_t num_chunks = 0, num_elements = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    num_chunks += (tensors[i].numel + kChunk - 1) / kChunk;
    num_elements += tensors[i].numel;
    chunk_ends[i] = num_chunks;
  }
  const int64_t grain =
      num_elements < kSerialElements
          ? std::max<int64_t>(num_chunks, 1)
          : std::max<int64_t>(1, num_chunks * (kSerialElements / 2) / num_elements);
  parallel_for(0, num_chunks, grain, [&](int64_t chunk, int64_t last_chunk) {
    int64_t i = std::upper_bound(chunk_ends.begin(), chunk_ends.end(), chunk) - chunk_ends.begin();
    while (chunk < last_chunk) {
      // A tensor's consecutive chunks are one range.
      const int64_t first = i == 0 ? 0 : chunk_ends[i - 1];
      const int64_t stop = std::min(chunk_ends[i], last_chunk);
      f(i, (chunk - first) * kChunk, std::min((stop - first) * kChunk, tensors[i].numel));
      chunk = stop;
      ++i;
    }
  });
}

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
  for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end) {
    FUSED_ISA_DISPATCH(adam_chunk<T>, p, p.tensors[i], scales[i], begin, end);
  });
}

template <typename T>
void sgd(const SgdParams& p) {
  const auto scales = sgd_scales<Accumulator<T>>(p);
  for_each_chunk(p.tensors, p.num_tensors, [&](int64_t i, int64_t begin, int64_t end) {
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
