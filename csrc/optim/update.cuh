// A step on the GPU, whatever its rule: one pass over parameters, gradients and states.
//
// A block updates one chunk of one tensor (tensor_table.cuh), a warp one span of it at a time
// (span.cuh).
#pragma once

#include <type_traits>

#include "common/warp.cuh"
#include "optim/optim_math.h"
#include "optim/span.cuh"
#include "optim/tensor_table.cuh"

namespace fused {

static_assert(kLaneElements == kRandomGroup && kOptimChunk % kQuantBlock == 0);

enum OptimColumn {
  kParam,
  kGrad,
  kState0,
  kScale0 = kState0 + kMaxStates,
  kMaster = kScale0 + kMaxStates,
  kEma,
  kIndex,
  kStep,  // the bits of a double, or a pointer
  kOptimColumns
};
using OptimTable = TensorTable<kOptimColumns>;

// Where a launch finds its tensors' step counts.
enum class StepPlace : int8_t { kNone, kTable, kDeviceFloat, kDeviceDouble };

__device__ __forceinline__ double step_of(const void* entry, StepPlace place) {
  if (place == StepPlace::kNone) return 0;
  if (place == StepPlace::kTable) return detail::bit_cast<double>(entry);
  return read_step(entry, place == StepPlace::kDeviceDouble);
}

// Where a tensor's data are.
struct OptimPointers {
  void *param, *grad, *states[kMaxStates], *scales[kMaxStates], *master, *ema;
  int64_t index;

  __device__ __forceinline__ OptimPointers(const OptimTable& table, int32_t tensor)
      : param(table.at(kParam, tensor)),
        grad(table.at(kGrad, tensor)),
        master(table.at(kMaster, tensor)),
        ema(table.at(kEma, tensor)),
        index(reinterpret_cast<int64_t>(table.at(kIndex, tensor))) {
#pragma unroll
    for (int k = 0; k < kMaxStates; ++k) {
      states[k] = table.at(kState0 + k, tensor);
      scales[k] = table.at(kScale0 + k, tensor);
    }
  }
  __device__ __forceinline__ bool is_aligned() const {
    uintptr_t bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                     reinterpret_cast<uintptr_t>(master) | reinterpret_cast<uintptr_t>(ema);
#pragma unroll
    for (int k = 0; k < kMaxStates; ++k) bits |= reinterpret_cast<uintptr_t>(states[k]);
    return bits % 16 == 0;
  }
};

template <bool kUnsigned, int kPack, typename S, typename A>
__device__ __forceinline__ void load_state(const OptimPointers& at, int k, const Span& span,
                                           A (&values)[kLaneElements]) {
  S stored[kLaneElements];
  load_span<kPack>(static_cast<const S*>(at.states[k]), span, stored);
  if constexpr (std::is_same_v<S, uint8_t>) {
    const float scale = static_cast<const float*>(at.scales[k])[span.begin / kQuantBlock];
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) values[j] = dequantize<kUnsigned>(stored[j], scale);
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) values[j] = load(stored[j]);
  }
}

template <bool kUnsigned, int kPack, typename S, typename A>
__device__ __forceinline__ void store_state(const OptimPointers& at, int k, const Span& span,
                                            const A (&values)[kLaneElements]) {
  S stored[kLaneElements];
  if constexpr (std::is_same_v<S, uint8_t>) {
    float largest = 0;
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      const float magnitude = fabsf(static_cast<float>(values[j]));
      const bool replaces = magnitude > largest || magnitude != magnitude;  // NaN wins
      if (element_of<kPack>(span, j) < span.count && replaces) largest = magnitude;
    }
    const float scale = warp_max(largest);
    __syncwarp();  // every lane has read the old scale
    if (span.lane == 0) static_cast<float*>(at.scales[k])[span.begin / kQuantBlock] = scale;
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      stored[j] = quantize<kUnsigned>(static_cast<float>(values[j]), scale);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      stored[j] = store<S>(static_cast<Accumulator<S>>(values[j]));
    }
  }
  store_span<kPack>(stored, span, static_cast<S*>(at.states[k]));
}

// The parameter as the maths has it: the master where there is one.
template <int kPack, typename T, typename A>
__device__ __forceinline__ void load_param(const OptimCommon& c, const OptimPointers& at,
                                           const Span& span, A (&w)[kLaneElements]) {
  if constexpr (sizeof(T) == 2) {
    if (c.master == MasterType::kFloat32) {
      return load_span<kPack>(static_cast<const float*>(at.master), span, w);
    }
  }
  T param[kLaneElements];
  load_span<kPack>(static_cast<const T*>(at.param), span, param);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (c.master == MasterType::kRemainder) {
      int16_t remainder[kLaneElements];
      load_span<kPack>(static_cast<const int16_t*>(at.master), span, remainder);
#pragma unroll
      for (int j = 0; j < kLaneElements; ++j) w[j] = join_remainder(param[j], remainder[j]);
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) w[j] = load(param[j]);
}

// Stores the parameter; `w` becomes what its moving average follows: the master where there is one,
// else what was stored.
template <int kPack, typename T, typename A>
__device__ __forceinline__ void store_param(const OptimCommon& c, const OptimPointers& at,
                                            const Span& span, A (&w)[kLaneElements]) {
  T param[kLaneElements];
  bool done = false;
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (c.master == MasterType::kRemainder) {
      int16_t remainder[kLaneElements];
#pragma unroll
      for (int j = 0; j < kLaneElements; ++j) param[j] = split_remainder(w[j], remainder[j]);
      store_span<kPack>(remainder, span, static_cast<int16_t*>(at.master));
      done = true;
    }
  }
  if constexpr (sizeof(T) == 2) {
    if (c.maybe_rng != nullptr) {
      static_assert(kPack == kRandomGroup, "a lane's elements lie side by side");
      const int64_t group = span.begin / kRandomGroup + span.lane;
      const Philox4 bits = random_bits(c.maybe_rng, at.index, group);
#pragma unroll
      for (int j = 0; j < kLaneElements; ++j) {
        param[j] = round_stochastically<T>(w[j], random_of_element(bits, j));
      }
      done = true;
    } else if (c.master == MasterType::kFloat32) {
      store_span<kPack>(w, span, static_cast<float*>(at.master));
    }
  }
  if (!done) {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) param[j] = store<T>(w[j]);
  }
  store_span<kPack>(param, span, static_cast<T*>(at.param));
  if (c.master != MasterType::kNone) return;
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) w[j] = load(param[j]);
}

template <int kPack, typename T, typename A>
__device__ __forceinline__ void load_grad(const OptimCommon& c, const OptimPointers& at,
                                          const Span& span, A (&g)[kLaneElements]) {
  T grad[kLaneElements];
  load_span<kPack>(static_cast<const T*>(at.grad), span, grad);
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) g[j] = load(grad[j]);
  if (c.maybe_grad_scale != nullptr) {
    const A scale = static_cast<A>(*c.maybe_grad_scale);
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      g[j] = g[j] / scale;
      grad[j] = store<T>(g[j]);
    }
    if (!c.zero_grad) store_span<kPack>(grad, span, static_cast<T*>(at.grad));
  }
}

template <int kPack, typename T>
__device__ __forceinline__ void clear_grad(const OptimPointers& at, const Span& span) {
  const T zeros[kLaneElements] = {};
  store_span<kPack>(zeros, span, static_cast<T*>(at.grad));
}

template <int kPack, typename A>
__device__ __forceinline__ void average(const OptimCommon& c, const OptimPointers& at,
                                        const Span& span, const A (&w)[kLaneElements]) {
  A ema[kLaneElements];
  load_span<kPack>(static_cast<const A*>(at.ema), span, ema);
  const A decay = static_cast<A>(c.ema_decay), rest = static_cast<A>(1.0 - c.ema_decay);
#pragma unroll
  for (int j = 0; j < kLaneElements; ++j) ema[j] = decay * ema[j] + rest * w[j];
  store_span<kPack>(ema, span, static_cast<A*>(at.ema));
}

template <typename Rule, typename T, typename S>
__device__ __forceinline__ void update_span(
    const typename Rule::Params& p, const OptimPointers& at, const Span& span,
    const typename Rule::template Scales<Accumulator<T>>& scales) {
  using A = Accumulator<T>;
  constexpr int kPack = 16 / sizeof(T), kLast = Rule::kNumStates - 1;
  const bool all = Rule::has_all(p);
  A w[kLaneElements], g[kLaneElements], states[kMaxStates][kLaneElements] = {};
  load_param<kPack, T>(p.common, at, span, w);
  load_grad<kPack, T>(p.common, at, span, g);
  if constexpr (kLast > 0)
    load_state<Rule::template kUnsigned<0>, kPack, S>(at, 0, span, states[0]);
  if constexpr (kLast > 1)
    load_state<Rule::template kUnsigned<1>, kPack, S>(at, 1, span, states[1]);
  if (all) {
    load_state<Rule::template kUnsigned<kLast>, kPack, S>(at, kLast, span, states[kLast]);
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      Rule::template element<true>(scales, g[j], w[j], states[0][j], states[1][j], states[2][j]);
    }
    store_state<Rule::template kUnsigned<kLast>, kPack, S>(at, kLast, span, states[kLast]);
  } else {
#pragma unroll
    for (int j = 0; j < kLaneElements; ++j) {
      Rule::template element<false>(scales, g[j], w[j], states[0][j], states[1][j], states[2][j]);
    }
  }
  store_param<kPack, T>(p.common, at, span, w);
  if constexpr (kLast > 0)
    store_state<Rule::template kUnsigned<0>, kPack, S>(at, 0, span, states[0]);
  if constexpr (kLast > 1)
    store_state<Rule::template kUnsigned<1>, kPack, S>(at, 1, span, states[1]);
  if (at.ema != nullptr) average<kPack>(p.common, at, span, w);
  if (p.common.zero_grad) clear_grad<kPack, T>(at, span);
}

template <typename Rule, typename T, typename S>
__global__ void __launch_bounds__(kOptimThreads)
    optim_update_kernel(const OptimTable table, const typename Rule::Params p,
                        StepPlace step_place) {
  using Scales = typename Rule::template Scales<Accumulator<T>>;
  const bool skipped = step_is_skipped(p.common);
  if (skipped && !p.common.zero_grad) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const OptimPointers at(table, chunk.tensor);
  const bool aligned = at.is_aligned();

  // One thread works out the powers in double, for all.
  Scales& shared_scales = *shared_memory<Scales>();
  if (threadIdx.x == 0) {
    const double step = step_of(table.at(kStep, chunk.tensor), step_place);
    shared_scales = Rule::template scales<Accumulator<T>>(p, step);
  }
  __syncthreads();
  const Scales scales = shared_scales;

  const int warp = threadIdx.x / kWarpSize;
  // Not unrolled: stores keep the next iteration's loads from moving up, so it would only cost
  // registers.
#pragma unroll 1
  for (int64_t begin = chunk.begin + warp * kQuantBlock; begin < chunk.end;
       begin += kOptimThreads * kLaneElements) {
    const int64_t rest = chunk.end - begin;
    const int count = rest < kQuantBlock ? static_cast<int>(rest) : kQuantBlock;
    const Span span{begin, count, aligned && count == kQuantBlock,
                    static_cast<int>(threadIdx.x) % kWarpSize};
    if (skipped) {
      clear_grad<16 / sizeof(T), T>(at, span);
    } else {
      update_span<Rule, T, S>(p, at, span, scales);
    }
  }
}

// Launches for `num_tensors` tensors whose counts are in one place.
template <typename Rule, typename T, typename S>
Status launch_update(const typename Rule::Params& p, const OptimTensor* tensors,
                     int64_t num_tensors, StepPlace place, Stream stream) {
  static_assert(sizeof(OptimTable) + sizeof(typename Rule::Params) + sizeof(StepPlace) <= 4096);
  using Scales = typename Rule::template Scales<Accumulator<T>>;
  bool present[kOptimColumns] = {};
  present[kParam] = present[kGrad] = true;
  for (int64_t i = 0; i < num_tensors; ++i) {  // an empty tensor has nothing anywhere
    for (int k = 0; k < kMaxStates; ++k) {
      present[kState0 + k] |= tensors[i].states[k] != nullptr;
      present[kScale0 + k] |= tensors[i].state_scales[k] != nullptr;
    }
    present[kMaster] |= tensors[i].maybe_master != nullptr;
    present[kEma] |= tensors[i].maybe_ema != nullptr;
  }
  present[kIndex] = p.common.maybe_rng != nullptr;
  present[kStep] = place != StepPlace::kNone;
  const auto fill = [&](OptimTable& table, int64_t i) {
    const OptimTensor& t = tensors[i];
    table.set(kParam, t.param);
    table.set(kGrad, t.grad);
    for (int k = 0; k < kMaxStates; ++k) {
      table.set(kState0 + k, t.states[k]);
      table.set(kScale0 + k, t.state_scales[k]);
    }
    table.set(kMaster, t.maybe_master);
    table.set(kEma, t.maybe_ema);
    table.set(kIndex, reinterpret_cast<void*>(t.index));
    void* step = t.maybe_step;
    if (place == StepPlace::kTable) {
      step = detail::bit_cast<void*>(read_step(t.maybe_step, t.step_is_double) + 1);
    }
    table.set(kStep, step);
  };
  const auto numel = [&](int64_t i) { return tensors[i].numel; };
  const auto start = [&](const OptimTable& table) {
    return launch(optim_update_kernel<Rule, T, S>, dim3(table.total_chunks()), dim3(kOptimThreads),
                  sizeof(Scales), stream, table, p, place);
  };
  return for_each_table(OptimTable(present), num_tensors, numel, fill, start);
}

inline StepPlace place_of(const OptimTensor& t) {
  if (t.maybe_step == nullptr) return StepPlace::kNone;
  if (!t.step_on_device) return StepPlace::kTable;
  return t.step_is_double ? StepPlace::kDeviceDouble : StepPlace::kDeviceFloat;
}

// Counts on the device must have been advanced; those on the host are, at the end.
template <typename Rule>
Status update_cuda(const typename Rule::Params& p, Stream stream) {
  const OptimTensor* tensors = p.common.tensors;
  const int64_t num_tensors = p.common.num_tensors;
  const auto update = [&](auto type, auto state_type) -> Status {
    // A launch reads its counts from one place; tensors of a group nearly always share it.
    for (int64_t begin = 0, end = 0; begin < num_tensors; begin = end) {
      const StepPlace place = place_of(tensors[begin]);
      while (end < num_tensors && place_of(tensors[end]) == place) ++end;
      if (const Status failed = launch_update<Rule, decltype(type), decltype(state_type)>(
              p, tensors + begin, end - begin, place, stream)) {
        return failed;
      }
    }
    return nullptr;
  };
  if (const Status failed = visit_types(p.common, update)) return failed;
  for (int64_t i = 0; i < num_tensors; ++i) {
    const OptimTensor& t = tensors[i];
    if (place_of(t) != StepPlace::kTable) continue;
    write_step(t.maybe_step, t.step_is_double, read_step(t.maybe_step, t.step_is_double) + 1);
  }
  return nullptr;
}

}  // namespace fused
