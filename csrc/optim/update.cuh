// A step on the GPU, whatever its rule: one pass over parameters, gradients and states.
//
// A block updates one chunk of one tensor (tensor_table.cuh), a warp one span of it at a time
// (span.cuh).
#pragma once

#include <type_traits>

#include "common/warp.cuh"
#include "optim/optim_table.cuh"
#include "optim/span.cuh"

namespace fused {

static_assert(kLaneElements == kRandomGroup && kOptimChunk % kQuantBlock == 0);

// The count of a tensor; `argument`: of all of them.
__device__ __forceinline__ double step_of(const OptimTable& table, int32_t tensor, StepPlace place,
                                          double argument) {
  if (place == StepPlace::kNone) return 0;
  if (place == StepPlace::kArgument) return argument;
  void* entry = table.at(kStep, tensor);
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

// What a block has to do: one thread finds it out, for all.
template <typename Scales>
struct BlockWork {
  Chunk chunk;
  OptimPointers at;
  Scales scales;
};

template <typename Rule, typename T, typename S>
__global__ void __launch_bounds__(kOptimThreads, 1)
    optim_update_kernel(const OptimTable table, const typename Rule::Params p, StepPlace step_place,
                        double step_argument) {
  using A = Accumulator<T>;
  const bool skipped = step_is_skipped(p.common);
  if (skipped && !p.common.zero_grad) return;
  auto& work = *shared_memory<BlockWork<typename Rule::template Scales<A>>>();
  if (threadIdx.x == 0) {
    work.chunk = find_chunk(table, blockIdx.x);
    work.at = OptimPointers(table, work.chunk.tensor);
    const double step = step_of(table, work.chunk.tensor, step_place, step_argument);
    work.scales = Rule::template scales<A>(p, step);  // powers in double
  }
  __syncthreads();
  const auto scales = work.scales;
  const OptimPointers& at = work.at;
  const bool aligned = at.is_aligned();

  const int warp = threadIdx.x / kWarpSize;
  // Not unrolled: stores keep the next iteration's loads from moving up, so it would only cost
  // registers.
#pragma unroll 1
  for (int64_t begin = work.chunk.begin + warp * kQuantBlock; begin < work.chunk.end;
       begin += kOptimThreads * kLaneElements) {
    const int64_t rest = work.chunk.end - begin;
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

template <typename Rule, typename T, typename S>
Status start_update(const typename Rule::Params& p, const OptimTable& table, StepPlace place,
                    double step, Stream stream) {
  static_assert(sizeof(table) + sizeof(p) + sizeof(place) + sizeof(step) <= 4096);
  using Work = BlockWork<typename Rule::template Scales<Accumulator<T>>>;
  return launch(optim_update_kernel<Rule, T, S>, dim3(table.total_chunks), dim3(kOptimThreads),
                sizeof(Work), stream, table, p, place, step);
}

// Launches for `num_tensors` tensors whose counts are in one place.
template <typename Rule, typename T, typename S>
Status launch_update(const typename Rule::Params& p, const OptimTensor* tensors,
                     int64_t num_tensors, StepPlace place, Stream stream) {
  const auto fill = [&](OptimTable& table, int64_t i) {
    const OptimTensor& t = tensors[i];
    const bool on_host = place == StepPlace::kTable;
    fill_row(table, t, on_host ? detail::bit_cast<void*>(next_host_step(t)) : t.maybe_step);
  };
  const auto numel = [&](int64_t i) { return tensors[i].numel; };
  const auto start = [&](const OptimTable& table) {
    return start_update<Rule, T, S>(p, table, place, /*step=*/0, stream);
  };
  return for_each_table(make_table(p.common, tensors, num_tensors, place), num_tensors, numel, fill,
                        start);
}

// One launch for any number of tensors.
template <typename Rule, typename T, typename S>
Status launch_outside_table(const typename Rule::Params& p, Stream stream) {
  const OptimTensor& first = p.common.tensors[0];
  const OptimTable table = table_outside(p.common.device_table);
  const StepPlace place = place_of(first);
  if (place != StepPlace::kTable) return start_update<Rule, T, S>(p, table, place, 0, stream);
  return start_update<Rule, T, S>(p, table, StepPlace::kArgument, next_host_step(first), stream);
}

// Counts on the device must have been advanced; those on the host are, at the end.
template <typename Rule>
Status update_cuda(const typename Rule::Params& p, Stream stream) {
  const OptimTensor* tensors = p.common.tensors;
  const int64_t num_tensors = p.common.num_tensors;
  const auto update = [&](auto type, auto state_type) -> Status {
    using T = decltype(type);
    using S = decltype(state_type);
    if (uses_device_table(p.common)) return launch_outside_table<Rule, T, S>(p, stream);
    // A launch reads its counts from one place; tensors of a group nearly always share it.
    for (int64_t begin = 0, end = 0; begin < num_tensors; begin = end) {
      const StepPlace place = place_of(tensors[begin]);
      while (end < num_tensors && place_of(tensors[end]) == place) ++end;
      if (const Status failed =
              launch_update<Rule, T, S>(p, tensors + begin, end - begin, place, stream)) {
        return failed;
      }
    }
    return nullptr;
  };
  if (const Status failed = visit_types(p.common, update)) return failed;
  for (int64_t i = 0; i < num_tensors; ++i) {
    const OptimTensor& t = tensors[i];
    if (place_of(t) != StepPlace::kTable) continue;
    write_step(t.maybe_step, t.step_is_double, next_host_step(t));
  }
  return nullptr;
}

}  // namespace fused
