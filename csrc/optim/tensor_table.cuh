// Many tensors in one launch: a table of them travels in the kernel's arguments, and each block
// finds its chunk of one tensor in it. No device memory, no copy, nothing for the host to wait for.
//
// Grid (chunks of all tensors in the table): block b works on elements [begin, end) of one tensor.
// A launch takes as many tensors as fit 4 KB of arguments, of any size; more tensors, more
// launches.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "common/vector_load.cuh"
#include "optim/chunks.h"

namespace fused {

constexpr int kOptimThreads = 256;

// What is left of the 4 KB of arguments for the options.
constexpr size_t kOptionBytes = 256;

// `kPointers` arrays of each tensor, and one value of 8 bytes.
template <int kPointers>
struct TensorTable {
  static constexpr int kCapacity = (4096 - kOptionBytes) / (8 * kPointers + 8 + 8 + 8);

  void* pointers[kPointers][kCapacity];
  int64_t numel[kCapacity];
  int64_t value[kCapacity];
  int64_t chunk_end[kCapacity];  // chunks of this tensor and all before it
  int32_t num_tensors;

  int64_t num_chunks() const { return num_tensors == 0 ? 0 : chunk_end[num_tensors - 1]; }
  bool is_full() const { return num_tensors == kCapacity; }
};

// A block's part of the table.
struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // elements
};

template <int kPointers>
__device__ __forceinline__ Chunk find_chunk(const TensorTable<kPointers>& table, int64_t block) {
  // The first tensor whose chunks end behind this block. Empty tensors have none, and are passed
  // by.
  int32_t low = 0, high = table.num_tensors - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (table.chunk_end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int64_t first = low == 0 ? 0 : table.chunk_end[low - 1];
  const int64_t begin = (block - first) * kOptimChunk;
  const int64_t rest = table.numel[low] - begin;
  return {low, begin, begin + (rest < kOptimChunk ? rest : kOptimChunk)};
}

// Whether all of a tensor's arrays can be read in packs. Chunks keep the tensor's alignment.
template <typename T, int kPointers>
__device__ __forceinline__ bool is_aligned(const TensorTable<kPointers>& table, int32_t tensor) {
  uintptr_t bits = 0;
#pragma unroll
  for (int k = 0; k < kPointers; ++k) {
    bits |= reinterpret_cast<uintptr_t>(table.pointers[k][tensor]);
  }
  return bits % sizeof(Pack<T>) == 0;
}

// Calls update_pack(i) for the chunk's aligned packs from element i on, and update_one(i) for the
// elements that are left: all of a misaligned tensor's, and the tail of any.
template <typename T, typename UpdatePack, typename UpdateOne>
__device__ __forceinline__ void for_each_element(const Chunk& chunk, bool aligned,
                                                 const UpdatePack& update_pack,
                                                 const UpdateOne& update_one) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t length = chunk.end - chunk.begin;
  const int64_t packs_end = aligned ? chunk.begin + length / kPack * kPack : chunk.begin;
  // Not unrolled: stores keep the next iteration's loads from moving up, so it would only cost
  // registers. What hides latency is one pack of each array in flight in every thread.
#pragma unroll 1
  for (int64_t i = chunk.begin + threadIdx.x * kPack; i < packs_end; i += kOptimThreads * kPack) {
    update_pack(i);
  }
#pragma unroll 1
  for (int64_t i = packs_end + threadIdx.x; i < chunk.end; i += kOptimThreads) update_one(i);
}

// Cuts `num_tensors` into tables: calls fill(table, slot, i) to enter tensor i, of numel(i)
// elements, and launch(table) for each full table and the last. Stops at the first failure.
template <typename Table, typename Numel, typename Fill, typename Launch>
Status for_each_table(int64_t num_tensors, const Numel& numel, const Fill& fill,
                      const Launch& launch) {
  Table table;
  table.num_tensors = 0;
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int32_t slot = table.num_tensors;
    table.numel[slot] = numel(i);
    table.chunk_end[slot] = table.num_chunks() + num_chunks(numel(i));
    fill(table, slot, i);
    ++table.num_tensors;
    if (table.is_full() || i + 1 == num_tensors) {
      if (const Status failed = launch(table)) return failed;
      table.num_tensors = 0;
    }
  }
  return nullptr;
}

}  // namespace fused
