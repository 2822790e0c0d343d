// Norms and clipping on the GPU.
//
// Grid (chunks of all tensors in a table): block b reads one chunk of one tensor in packs of 16
// bytes (tensor_table.cuh), every thread sums its squares, and shuffles add up the threads' sums
// in a fixed order. A last block of one adds up the chunks. Nothing is sent to the host.
#include "common/warp.cuh"
#include "optim/norm.h"
#include "optim/optim_table.cuh"

namespace fused {
namespace {

using NormTable = TensorTable<1>;
constexpr int kSumThreads = 1024;

// Calls visit_pack(i) for the chunk's aligned packs from element i on, and visit_one(i) for the
// elements that are left: all of a misaligned tensor's, and the tail of any.
template <typename T, typename VisitPack, typename VisitOne>
__device__ __forceinline__ void for_each_element(const Chunk& chunk, const T* x,
                                                 const VisitPack& visit_pack,
                                                 const VisitOne& visit_one) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t length = chunk.end - chunk.begin;
  const int64_t packs_end =
      is_pack_aligned(x, 0) ? chunk.begin + length / kPack * kPack : chunk.begin;
  for (int64_t i = chunk.begin + threadIdx.x * kPack; i < packs_end; i += kOptimThreads * kPack) {
    visit_pack(i);
  }
#pragma unroll 1
  for (int64_t i = packs_end + threadIdx.x; i < chunk.end; i += kOptimThreads) visit_one(i);
}

// The sum over the block's threads, in thread 0. `shared` holds a value for each warp.
__device__ __forceinline__ double block_sum(double value, double* shared, int num_warps) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return 0;
  return warp_sum(static_cast<int>(threadIdx.x) < num_warps ? shared[threadIdx.x] : 0.0);
}

template <typename T>
__global__ void __launch_bounds__(kOptimThreads)
    norm_partials_kernel(const NormTable table, double* partials) {
  using A = Accumulator<T>;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const T* x = static_cast<const T*>(table.at(0, chunk.tensor));
  assume_global(x);
  double sum = 0;
  const auto add_pack = [&](int64_t i) {
    const Pack<T> pack = load_pack(x + i);
    A squares = 0;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      const A value = load(pack.element[j]);
      squares += value * value;
    }
    sum += squares;
  };
  const auto add_one = [&](int64_t i) {
    const A value = load(x[i]);
    sum += value * value;
  };
  for_each_element(chunk, x, add_pack, add_one);
  const double total = block_sum(sum, shared_memory<double>(), kOptimThreads / kWarpSize);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kSumThreads) norm_sum_kernel(const NormSumParams p) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.num_partials; i += kSumThreads) sum += p.partials[i];
  const double total = block_sum(sum, shared_memory<double>(), kSumThreads / kWarpSize);
  if (threadIdx.x != 0) return;
  *p.norm = sqrt(total) / (p.maybe_grad_scale ? *p.maybe_grad_scale : 1.0f);
}

template <typename T>
__global__ void __launch_bounds__(kOptimThreads)
    clip_kernel(const NormTable table, const double* norm, double max_norm) {
  using A = Accumulator<T>;
  const double coefficient = clip_coefficient(*norm, max_norm);
  if (coefficient == 1.0) return;
  const A factor = static_cast<A>(coefficient);
  const Chunk chunk = find_chunk(table, blockIdx.x);
  T* x = static_cast<T*>(table.at(0, chunk.tensor));
  assume_global(x);
  const auto multiply_pack = [&](int64_t i) {
    Pack<T> pack = load_pack(x + i);
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      pack.element[j] = store<T>(load(pack.element[j]) * factor);
    }
    *reinterpret_cast<Pack<T>*>(x + i) = pack;
  };
  const auto multiply_one = [&](int64_t i) { x[i] = store<T>(load(x[i]) * factor); };
  for_each_element(chunk, x, multiply_pack, multiply_one);
}

// Calls start(table) for tables that hold all tensors.
template <typename Start>
Status for_each_norm_table(const NormTensor* tensors, int64_t num_tensors, const Start& start) {
  const auto numel = [&](int64_t i) { return tensors[i].numel; };
  const auto fill = [&](NormTable& table, int64_t i) { table.set(0, tensors[i].data); };
  return for_each_table(NormTable({true}), num_tensors, numel, fill, start);
}

}  // namespace

Status norm_partials_cuda(const NormPartialsParams& p, Stream stream) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    double* partials = p.partials;
    const auto start = [&](const NormTable& table) {
      const Status status =
          launch(norm_partials_kernel<T>, dim3(table.total_chunks), dim3(kOptimThreads),
                 kOptimThreads / kWarpSize * sizeof(double), stream, table, partials);
      partials += table.total_chunks;
      return status;
    };
    if (p.device_table.words != nullptr) {
      return start(NormTable(p.device_table, {place_in_device_table(kGrad)}));
    }
    return for_each_norm_table(p.tensors, p.num_tensors, start);
  });
}

Status norm_sum_cuda(const NormSumParams& p, Stream stream) {
  return launch(norm_sum_kernel, dim3(1), dim3(kSumThreads),
                kSumThreads / kWarpSize * sizeof(double), stream, p);
}

Status clip_cuda(const ClipParams& p, Stream stream) {
  return visit_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return for_each_norm_table(p.tensors, p.num_tensors, [&](const NormTable& table) {
      return launch(clip_kernel<T>, dim3(table.total_chunks), dim3(kOptimThreads), 0, stream, table,
                    p.norm, p.max_norm);
    });
  });
}

}  // namespace fused
