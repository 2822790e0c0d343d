#include "emulator/capture.h"

#include <mutex>
#include <stdexcept>
#include <utility>

#include "emulator/runtime.h"

namespace fused::emulator {
namespace {

struct Capture {
  std::mutex mutex;
  bool is_on = false;
  std::vector<std::function<Status()>> launches;
};

Capture& capture() {
  static Capture capture;
  return capture;
}

}  // namespace

void begin_capture() {
  const std::lock_guard<std::mutex> lock(capture().mutex);
  if (capture().is_on) throw std::logic_error("emulator: a graph is being captured already");
  capture().is_on = true;
}

bool is_capturing() {
  const std::lock_guard<std::mutex> lock(capture().mutex);
  return capture().is_on;
}

size_t num_captured() {
  const std::lock_guard<std::mutex> lock(capture().mutex);
  return capture().launches.size();
}

CapturedLaunches end_capture() {
  const std::lock_guard<std::mutex> lock(capture().mutex);
  capture().is_on = false;
  return CapturedLaunches(std::exchange(capture().launches, {}));
}

Status submit(std::function<Status()> launch) {
  {
    const std::lock_guard<std::mutex> lock(capture().mutex);
    if (capture().is_on) {
      capture().launches.push_back(std::move(launch));
      return nullptr;
    }
  }
  return launch();
}

CapturedLaunches::CapturedLaunches(std::vector<std::function<Status()>> launches)
    : launches_(std::move(launches)) {}

Status CapturedLaunches::run(size_t begin, size_t end) const {
  for (size_t i = begin; i < end; ++i) {
    if (const Status failed = launches_.at(i)()) return failed;
  }
  return nullptr;
}

}  // namespace fused::emulator
