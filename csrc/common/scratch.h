// Working memory of a CPU kernel's thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fused {

// `count` uninitialised elements, aligned to a cache line and so to every vector register.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr size_t kAlignment = 64;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    data_.reset(static_cast<T*>(
        std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment)));
    if (!data_) throw std::bad_alloc();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace fused
