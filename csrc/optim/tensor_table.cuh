// Many tensors in one launch: a table of them travels in the kernel's arguments, and each block
// finds its chunk of one tensor in it. No device memory, no copy, nothing for the host to wait for.
//
// Grid (chunks of all tensors in the table): block b works on elements [begin, end) of one tensor.
// A launch takes as many tensors as fit 4 KB of arguments, of any size; more tensors, more
// launches.
#pragma once

#include "common/launch.h"
#include "common/vector_load.cuh"
#include "optim/chunks.h"

namespace fused {

constexpr int kOptimThreads = 256;

// What is left of the 4 KB of arguments for the options.
constexpr size_t kOptionBytes = 400;

// Columns of 8 bytes: for each tensor where its chunks end, its length, and whichever of the
// kernel's own kColumns this launch uses. The fewer those are, the more tensors fit.
template <int kColumns>
struct TensorTable {
  static constexpr int kWords = (4096 - kOptionBytes) / 8;

  void* words[kWords];  // column after column, `capacity` each
  int32_t num_tensors, capacity;
  int8_t place[kColumns];  // of each of the kernel's columns; 0 where it is absent

  // `present`: which columns there are.
  explicit TensorTable(const bool (&present)[kColumns]) {
    int8_t num_columns = 2;
    for (int column = 0; column < kColumns; ++column) {
      place[column] = present[column] ? num_columns++ : 0;
    }
    capacity = kWords / num_columns;
    num_tensors = 0;
  }

  __host__ __device__ __forceinline__ int64_t chunk_end(int32_t tensor) const {
    return reinterpret_cast<int64_t>(words[tensor]);
  }
  __host__ __device__ __forceinline__ int64_t numel(int32_t tensor) const {
    return reinterpret_cast<int64_t>(words[capacity + tensor]);
  }
  // What a tensor has in a column, nullptr where the column is absent.
  __device__ __forceinline__ void* at(int column, int32_t tensor) const {
    return place[column] == 0 ? nullptr : words[place[column] * capacity + tensor];
  }

  void set(int column, void* value) {
    if (place[column] != 0) words[place[column] * capacity + num_tensors] = value;
  }
  // Ends the row that was set.
  void push(int64_t numel) {
    const int64_t end = total_chunks() + fused::num_chunks(numel);
    words[num_tensors] = reinterpret_cast<void*>(end);
    words[capacity + num_tensors] = reinterpret_cast<void*>(numel);
    ++num_tensors;
  }
  int64_t total_chunks() const { return num_tensors == 0 ? 0 : chunk_end(num_tensors - 1); }
  bool is_full() const { return num_tensors == capacity; }
};

// A block's part of the table.
struct Chunk {
  int32_t tensor;
  int64_t begin, end;  // elements
};

template <int kColumns>
__device__ __forceinline__ Chunk find_chunk(const TensorTable<kColumns>& table, int64_t block) {
  // The first tensor whose chunks end behind this block. Empty tensors have none, and are passed
  // by.
  int32_t low = 0, high = table.num_tensors - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (table.chunk_end(middle) > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int64_t first = low == 0 ? 0 : table.chunk_end(low - 1);
  const int64_t begin = (block - first) * kOptimChunk;
  const int64_t rest = table.numel(low) - begin;
  return {low, begin, begin + (rest < kOptimChunk ? rest : kOptimChunk)};
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
    }
  }
  return nullptr;
}

}  // namespace fused
