// SGD on the GPU: one pass over parameters, gradients and momentum, in packs of 16 bytes.
//
// A block updates one chunk of one tensor (tensor_table.cuh); a thread holds one pack of each array
// at a time.
#include "optim/optim_math.h"
#include "optim/tensor_table.cuh"

namespace fused {
namespace {

enum SgdPointer { kParam, kGrad, kMomentumBuffer };
template <bool kMomentum>
using SgdTable = TensorTable<kMomentum ? 3 : 2>;

// Four blocks at least: left to itself, nvcc spills a register of double's for the sake of more.
template <typename T, bool kMomentum>
__global__ void __launch_bounds__(kOptimThreads, 4)
    sgd_kernel(const SgdTable<kMomentum> table, const SgdParams p) {
  using A = Accumulator<T>;
  if (step_is_skipped(p.gradients)) return;
  const Chunk chunk = find_chunk(table, blockIdx.x);
  const SgdScales<A> scales = sgd_scales<A>(p);

  T* param = static_cast<T*>(table.pointers[kParam][chunk.tensor]);
  T* grad = static_cast<T*>(table.pointers[kGrad][chunk.tensor]);
  T* momentum_buffer = nullptr;
  if constexpr (kMomentum) {
    momentum_buffer = static_cast<T*>(table.pointers[kMomentumBuffer][chunk.tensor]);
  }
  const bool scaled = p.gradients.maybe_grad_scale != nullptr;

  const auto update = [&](T& param_i, T& grad_i, T* buffer_i) {
    A g = load(grad_i);
    if (scaled) {
      g = g / scales.grad_scale;
      grad_i = store<T>(g);
    }
    A w = load(param_i), buffer = kMomentum ? load(*buffer_i) : A(0);
    sgd_element<kMomentum>(scales, g, w, buffer);
    param_i = store<T>(w);
    if (kMomentum) *buffer_i = store<T>(buffer);
  };
  const auto update_pack = [&](int64_t i) {
    Pack<T> w = load_pack(param + i), g = load_pack(grad + i),
            buffer = kMomentum ? load_pack(momentum_buffer + i) : g;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      update(w.element[j], g.element[j], &buffer.element[j]);
    }
    *reinterpret_cast<Pack<T>*>(param + i) = w;
    if (kMomentum) *reinterpret_cast<Pack<T>*>(momentum_buffer + i) = buffer;
    if (scaled) *reinterpret_cast<Pack<T>*>(grad + i) = g;
  };
  const auto update_one = [&](int64_t i) {
    update(param[i], grad[i], kMomentum ? momentum_buffer + i : nullptr);
  };
  for_each_element<T>(chunk, is_aligned<T>(table, chunk.tensor), update_pack, update_one);
}

template <typename T, bool kMomentum>
Status launch_tensors(const SgdParams& p, Stream stream) {
  using Table = SgdTable<kMomentum>;
  static_assert(sizeof(Table) + sizeof(SgdParams) <= 4096);
  const auto numel = [&](int64_t i) { return p.tensors[i].numel; };
  const auto fill = [&](Table& table, int32_t slot, int64_t i) {
    table.pointers[kParam][slot] = p.tensors[i].param;
    table.pointers[kGrad][slot] = p.tensors[i].grad;
    if constexpr (kMomentum) {
      table.pointers[kMomentumBuffer][slot] = p.tensors[i].maybe_momentum_buffer;
    }
  };
  const auto start = [&](const Table& table) {
    return launch(sgd_kernel<T, kMomentum>, dim3(table.num_chunks()), dim3(kOptimThreads), 0,
                  stream, table, p);
  };
  return for_each_table<Table>(p.num_tensors, numel, fill, start);
}

}  // namespace

Status sgd_cuda(const SgdParams& params, Stream stream) {
  return visit_dtype(params.dtype, [&](auto type) {
    using T = decltype(type);
    return params.momentum != 0 ? launch_tensors<T, true>(params, stream)
                                : launch_tensors<T, false>(params, stream);
  });
}

}  // namespace fused
