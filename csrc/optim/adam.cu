// Adam and AdamW on the GPU: one pass over parameters, gradients and moments, in packs of 16 bytes.
//
// A block updates one chunk of one tensor (tensor_table.cuh); a thread holds one pack of each array
// at a time. Step counts on the device are incremented by a launch of their own ahead of the
// update, because many blocks read one count; counts on the host travel in the table.
#include "optim/optim_math.h"
#include "optim/tensor_table.cuh"

namespace fused {
namespace {

// Param, grad, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq; `value` is the step, as the
// bits of a double or as a pointer.
enum AdamPointer { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq };
template <bool kAmsgrad>
using AdamTable = TensorTable<kAmsgrad ? 5 : 4>;

// Where a launch finds its tensors' step counts.
enum class StepPlace : int8_t { kTable, kDeviceFloat, kDeviceDouble };

__device__ __forceinline__ double step_of(int64_t value, StepPlace place) {
  if (place == StepPlace::kTable) return detail::bit_cast<double>(value);
  return read_step(reinterpret_cast<const void*>(value), place == StepPlace::kDeviceDouble);
}

template <typename T, bool kAmsgrad>
__global__ void __launch_bounds__(kOptimThreads)
    adam_kernel(const AdamTable<kAmsgrad> table, const AdamParams p, StepPlace step_place) {
  using A = Accumulator<T>;
  if (step_is_skipped(p.gradients)) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);

  // One thread works out the powers in double, for all.
  AdamScales<A>& shared_scales = *shared_memory<AdamScales<A>>();
  if (threadIdx.x == 0) {
    shared_scales = adam_scales<A>(p, step_of(table.value[chunk.tensor], step_place));
  }
  __syncthreads();
  const AdamScales<A> scales = shared_scales;

  T* param = static_cast<T*>(table.pointers[kParam][chunk.tensor]);
  T* grad = static_cast<T*>(table.pointers[kGrad][chunk.tensor]);
  T* exp_avg = static_cast<T*>(table.pointers[kExpAvg][chunk.tensor]);
  T* exp_avg_sq = static_cast<T*>(table.pointers[kExpAvgSq][chunk.tensor]);
  T* max_exp_avg_sq = nullptr;
  if constexpr (kAmsgrad) {
    max_exp_avg_sq = static_cast<T*>(table.pointers[kMaxExpAvgSq][chunk.tensor]);
  }
  const bool scaled = p.gradients.maybe_grad_scale != nullptr;

  const auto update = [&](T& param_i, T& grad_i, T& exp_avg_i, T& exp_avg_sq_i, T* max_i) {
    A g = load(grad_i);
    if (scaled) {
      g = g / scales.grad_scale;
      grad_i = store<T>(g);
    }
    A w = load(param_i), m = load(exp_avg_i), v = load(exp_avg_sq_i);
    A v_max = kAmsgrad ? load(*max_i) : A(0);
    adam_element<kAmsgrad>(scales, g, w, m, v, v_max);
    param_i = store<T>(w);
    exp_avg_i = store<T>(m);
    exp_avg_sq_i = store<T>(v);
    if (kAmsgrad) *max_i = store<T>(v_max);
  };
  const auto update_pack = [&](int64_t i) {
    Pack<T> w = load_pack(param + i), g = load_pack(grad + i), m = load_pack(exp_avg + i),
            v = load_pack(exp_avg_sq + i), v_max = kAmsgrad ? load_pack(max_exp_avg_sq + i) : v;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      update(w.element[j], g.element[j], m.element[j], v.element[j], &v_max.element[j]);
    }
    *reinterpret_cast<Pack<T>*>(param + i) = w;
    *reinterpret_cast<Pack<T>*>(exp_avg + i) = m;
    *reinterpret_cast<Pack<T>*>(exp_avg_sq + i) = v;
    if (kAmsgrad) *reinterpret_cast<Pack<T>*>(max_exp_avg_sq + i) = v_max;
    if (scaled) *reinterpret_cast<Pack<T>*>(grad + i) = g;
  };
  const auto update_one = [&](int64_t i) {
    update(param[i], grad[i], exp_avg[i], exp_avg_sq[i], kAmsgrad ? max_exp_avg_sq + i : nullptr);
  };
  for_each_element<T>(chunk, is_aligned<T>(table, chunk.tensor), update_pack, update_one);
}

constexpr int kStepCapacity = 480;
struct StepTable {
  void* step[kStepCapacity];
  int32_t num_steps;
};

__global__ void __launch_bounds__(kOptimThreads)
    adam_advance_kernel(const StepTable table, const OptimGradients gradients, bool is_double) {
  const int32_t i = blockIdx.x * kOptimThreads + threadIdx.x;
  if (i >= table.num_steps || step_is_skipped(gradients)) return;
  write_step(table.step[i], is_double, read_step(table.step[i], is_double) + 1);
}

Status advance_device_steps(const AdamParams& p, bool is_double, Stream stream) {
  StepTable table;
  table.num_steps = 0;
  const auto flush = [&]() -> Status {
    const int blocks = (table.num_steps + kOptimThreads - 1) / kOptimThreads;
    const Status status = launch(adam_advance_kernel, dim3(blocks), dim3(kOptimThreads), 0, stream,
                                 table, p.gradients, is_double);
    table.num_steps = 0;
    return status;
  };
  for (int64_t i = 0; i < p.num_tensors; ++i) {
    const AdamTensor& t = p.tensors[i];
    if (!t.step_on_device || t.step_is_double != is_double) continue;
    table.step[table.num_steps++] = t.step;
    if (table.num_steps == kStepCapacity) {
      if (const Status failed = flush()) return failed;
    }
  }
  return flush();
}

template <typename T, bool kAmsgrad>
Status launch_tensors(const AdamParams& p, const AdamTensor* tensors, int64_t num_tensors,
                      StepPlace place, Stream stream) {
  using Table = AdamTable<kAmsgrad>;
  static_assert(sizeof(Table) + sizeof(AdamParams) + sizeof(StepPlace) <= 4096);
  const auto numel = [&](int64_t i) { return tensors[i].numel; };
  const auto fill = [&](Table& table, int32_t slot, int64_t i) {
    const AdamTensor& t = tensors[i];
    table.pointers[kParam][slot] = t.param;
    table.pointers[kGrad][slot] = t.grad;
    table.pointers[kExpAvg][slot] = t.exp_avg;
    table.pointers[kExpAvgSq][slot] = t.exp_avg_sq;
    if constexpr (kAmsgrad) table.pointers[kMaxExpAvgSq][slot] = t.maybe_max_exp_avg_sq;
    table.value[slot] = place == StepPlace::kTable
                            ? detail::bit_cast<int64_t>(read_step(t.step, t.step_is_double) + 1)
                            : reinterpret_cast<int64_t>(t.step);
  };
  const auto start = [&](const Table& table) {
    return launch(adam_kernel<T, kAmsgrad>, dim3(table.num_chunks()), dim3(kOptimThreads),
                  sizeof(AdamScales<Accumulator<T>>), stream, table, p, place);
  };
  return for_each_table<Table>(num_tensors, numel, fill, start);
}

StepPlace place_of(const AdamTensor& t) {
  if (!t.step_on_device) return StepPlace::kTable;
  return t.step_is_double ? StepPlace::kDeviceDouble : StepPlace::kDeviceFloat;
}

template <typename T>
Status adam(const AdamParams& p, Stream stream) {
  // A launch reads its counts from one place; tensors of a group nearly always share it.
  for (int64_t begin = 0, end = 0; begin < p.num_tensors; begin = end) {
    const StepPlace place = place_of(p.tensors[begin]);
    while (end < p.num_tensors && place_of(p.tensors[end]) == place) ++end;
    const auto launch_run = p.amsgrad ? launch_tensors<T, true> : launch_tensors<T, false>;
    if (const Status failed = launch_run(p, p.tensors + begin, end - begin, place, stream)) {
      return failed;
    }
  }
  return nullptr;
}

}  // namespace

Status adam_cuda(const AdamParams& params, Stream stream) {
  for (const bool is_double : {false, true}) {
    if (const Status failed = advance_device_steps(params, is_double, stream)) return failed;
  }
  const Status status =
      visit_dtype(params.dtype, [&](auto type) { return adam<decltype(type)>(params, stream); });
  if (status != nullptr) return status;
  for (int64_t i = 0; i < params.num_tensors; ++i) {
    const AdamTensor& t = params.tensors[i];
    if (t.step_on_device) continue;
    write_step(t.step, t.step_is_double, read_step(t.step, t.step_is_double) + 1);
  }
  return nullptr;
}

}  // namespace fused
