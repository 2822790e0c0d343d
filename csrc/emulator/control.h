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
  uint64_t seed = 0;                // of Order::kRandom
  size_t shared_limit = 64 * 1024;  // what sm_75, the oldest architecture supported, has
  int num_os_threads = 1;
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

// The name of the function at an address, from the symbol table of the file that holds it.
std::string kernel_name(const void* kernel);

}  // namespace fused::emulator
