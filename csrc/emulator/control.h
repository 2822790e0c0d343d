// What a test sets and reads: thread order, limits, OS threads, and the log of launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator/runtime.h"

namespace fused::emulator {

// In which order the ready threads of a block run, and the blocks of a grid start. Every order is
// legal; a kernel whose result depends on it has a race.
enum class Order { kForward, kReverse, kRandom };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;        // of Order::kRandom
  size_t shared_limit = 0;  // bytes that a block may have; 0: as in kernel_shared_limit()
  int num_os_threads = 1;
  int architecture = 80;  // of the device, times ten
};

Settings settings();
void set_settings(const Settings& settings);

// How often each kernel was launched in this process, by its demangled name without return type and
// parameters.
std::map<std::string, int64_t> launch_counts();

// The same names, of all functions of this library that are called one of `names` within their
// namespace: the instances of kernel templates, launched or not.
std::vector<std::string> instances_of(const std::vector<std::string>& names);

void count_launch(const void* kernel);

// The dynamic shared memory of a block on the least device that runs kernels for an architecture:
// 64 KB on sm_75; from sm_80 on 99 KB, of which sm_86, sm_89 and sm_120 have no more.
constexpr size_t kernel_shared_limit(int architecture) {
  return (architecture < 80 ? 64 : 99) * 1024;
}

struct Range {
  uintptr_t begin = 0;
  size_t size = 0;
};

// What the symbol table of its file tells of the kernel at an address.
struct Kernel {
  std::string name;
  std::vector<Range> static_shared;  // within this_threads_variables()
  size_t static_shared_bytes() const {
    size_t bytes = 0;
    for (const Range& variable : static_shared) bytes += variable.size;
    return bytes;
  }
};
const Kernel& kernel_at(const void* address);
inline const std::string& kernel_name(const void* kernel) { return kernel_at(kernel).name; }

// Where the thread_local variables of this library lie in the calling thread.
Range this_threads_variables();

}  // namespace fused::emulator
