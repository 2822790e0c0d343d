// Launches kept instead of run, as a CUDA graph keeps them: each with a copy of its arguments, to
// be run any number of times with what memory holds by then.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "common/status.h"

namespace fused::emulator {

// From here to end_capture(), submit() keeps the launches of all threads.
void begin_capture();
bool is_capturing();
size_t num_captured();

class CapturedLaunches {
 public:
  explicit CapturedLaunches(std::vector<std::function<Status()>> launches);
  // Runs launches [begin, end) in the order in which they were captured, up to one that fails.
  Status run(size_t begin, size_t end) const;

 private:
  std::vector<std::function<Status()>> launches_;
};
CapturedLaunches end_capture();

}  // namespace fused::emulator
