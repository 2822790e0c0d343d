// Many tensors in one launch: a table of them says what each block has to do.
//
// Grid (chunks of all tensors in the table): block b works on elements [begin, end) of one tensor.
// The table travels in the kernel's arguments: no device memory, no copy, nothing for the host to
// wait for. A launch takes as many tensors as fit 4 KB of them, of any size. More tensors are more
// launches, or one whose table lies in device memory (optim/device_table.h) and is read by the same
// code.
#pragma once

#include "common/launch.h"
#include "common/vector_load.cuh"
#include "optim/chunks.h"
#include "optim/device_table.h"

namespace fused {

constexpr int kOptimThreads = 256;

// What is left of the 4 KB of arguments for the options.
constexpr size_t kOptionBytes = 400;

// Columns of 8 bytes: for each tensor where its chunks end, its length, and whichever of the
// kernel's own kColumns this launch uses. The fewer those are, the more tensors fit.
template <int kColumns>
struct TensorTable {
  static constexpr int kWords = (4096 - kOptionBytes) / 8;
  static constexpr int kLeadingColumns = 2;

  void* words[kWords];  // column after column, `capacity` each
  // The words, and for each chunk its tensor, where they are in device memory.
  void** maybe_outside;
  const int32_t* outside_tensors;
  int64_t total_chunks;
  int32_t num_tensors, capacity;
  int8_t place[kColumns];  // of each of the kernel's columns; 0 where it is absent

  // `present`: which columns there are.
  explicit TensorTable(const bool (&present)[kColumns])
      : maybe_outside(nullptr), outside_tensors(nullptr), total_chunks(0), num_tensors(0) {
    int8_t num_columns = kLeadingColumns;
    for (int column = 0; column < kColumns; ++column) {
      place[column] = present[column] ? num_columns++ : 0;
    }
    capacity = kWords / num_columns;
  }

  // A table in device memory; `places`: which of its columns are the kernel's.
  TensorTable(const DeviceTable& table, const int8_t (&places)[kColumns])
      : maybe_outside(table.words),
        outside_tensors(table.chunk_tensors),
        total_chunks(table.num_chunks),
        num_tensors(static_cast<int32_t>(table.num_tensors)),
        capacity(num_tensors) {
    for (int column = 0; column < kColumns; ++column) place[column] = places[column];
  }

  __device__ __forceinline__ void* word(int32_t i) const {
    return maybe_outside != nullptr ? maybe_outside[i] : words[i];
  }
  __device__ __forceinline__ int64_t chunk_end(int32_t tensor) const {
    return reinterpret_cast<int64_t>(word(tensor));
  }
  __device__ __forceinline__ int64_t numel(int32_t tensor) const {
    return reinterpret_cast<int64_t>(word(capacity + tensor));
  }
  // What a tensor has in a column, nullptr where the column is absent.
  __device__ __forceinline__ void* at(int column, int32_t tensor) const {
    return place[column] == 0 ? nullptr : word(place[column] * capacity + tensor);
  }

  void set(int column, void* value) {
    if (place[column] != 0) words[place[column] * capacity + num_tensors] = value;
  }
  // Ends the row that was set.
  void push(int64_t numel) {
    total_chunks += fused::num_chunks(numel);
    words[num_tensors] = reinterpret_cast<void*>(total_chunks);
    words[capacity + num_tensors] = reinterpret_cast<void*>(numel);
    ++num_tensors;
  }
  bool is_full() const { return num_tensors == capacity; }
};

// Says that an address is one of global memory. Of one that was read from memory the compiler would
// not know, and take slower instructions.
__device__ __forceinline__ void assume_global([[maybe_unused]] const void* address) {
#ifndef FUSED_EMULATED
  __builtin_assume(__isGlobal(address));
#endif
}

// A block's part of the table.
struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // elements
};

// The tensor to which a chunk of the table belongs.
template <int kColumns>
__device__ __forceinline__ int32_t find_tensor(const TensorTable<kColumns>& table, int64_t chunk) {
  if (table.maybe_outside != nullptr) return table.outside_tensors[chunk];
  // The first whose chunks end behind this one. Empty tensors have none, and are passed by.
  int32_t low = 0, high = table.num_tensors - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (table.chunk_end(middle) > chunk) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <int kColumns>
__device__ __forceinline__ Chunk find_chunk(const TensorTable<kColumns>& table, int64_t block) {
  const int32_t tensor = find_tensor(table, block);
  const int64_t numel = table.numel(tensor);
  const int64_t first = table.chunk_end(tensor) - num_chunks(numel);
  const int64_t begin = (block - first) * kOptimChunk;
  const int64_t rest = numel - begin;
  return {tensor, begin, begin + (rest < kOptimChunk ? rest : kOptimChunk)};
}

// Cuts `num_tensors` into tables like `table`: calls fill(table, i) to set the row of tensor i, of
// numel(i) elements, and launch(table) for each full table and the last. Stops at the first
// failure.
template <typename Table, typename Numel, typename Fill, typename Launch>
Status for_each_table(Table table, int64_t num_tensors, const Numel& numel, const Fill& fill,
                      const Launch& launch) {
  for (int64_t i = 0; i < num_tensors; ++i) {
    fill(table, i);
    table.push(numel(i));
    if (table.is_full() || i + 1 == num_tensors) {
      if (const Status failed = launch(table)) return failed;
      table.num_tensors = 0;
      table.total_chunks = 0;
    }
  }
  return nullptr;
}

}  // namespace fused
