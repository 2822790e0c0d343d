// What a launcher returns, and what the library exports.
#pragma once

// The library is compiled with hidden visibility: only what the Python binding needs is exported.
#define FUSED_API __attribute__((visibility("default")))

namespace fused {

// nullptr on success, else a message that stays valid until this thread's next launch.
using Status = const char*;

// A cudaStream_t, without the CUDA headers. The CPU launchers take none.
using Stream = void*;

}  // namespace fused
