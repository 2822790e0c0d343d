#include "emulator/control.h"

#include <mutex>
#include <unordered_map>

namespace fused::emulator {
namespace {

struct State {
  std::mutex mutex;
  Settings settings;
  std::unordered_map<const void*, int64_t> launches;
};

State& state() {
  static State state;
  return state;
}

}  // namespace

Settings settings() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().settings;
}

void set_settings(const Settings& settings) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().settings = settings;
}

size_t shared_limit() { return settings().shared_limit; }

void count_launch(const void* kernel) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  ++state().launches[kernel];
}

std::map<std::string, int64_t> launch_counts() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  std::map<std::string, int64_t> counts;
  for (const auto& [kernel, count] : state().launches) counts[kernel_name(kernel)] += count;
  return counts;
}

}  // namespace fused::emulator
