#include "emulator/control.h"

#include <mutex>

namespace fused::emulator {
namespace {

struct State {
  std::mutex mutex;
  Settings settings;
  std::map<std::string, int64_t> launches;
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

int architecture() { return settings().architecture; }

void count_launch(const void* kernel) {
  const std::string name = kernel_name(kernel);
  const std::lock_guard<std::mutex> lock(state().mutex);
  ++state().launches[name];
}

std::map<std::string, int64_t> launch_counts() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().launches;
}

}  // namespace fused::emulator
