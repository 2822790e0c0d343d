// launch() is the only way a kernel is started, shared_memory() the only way it gets its shared
// memory. Included by .cu and .cuh files.
#pragma once

#include <atomic>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/simt.h"
#include "common/status.h"

namespace fused {

// The block's dynamic shared memory, aligned to 16 bytes at least. Its contents are undefined.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef FUSED_EMULATED
  return reinterpret_cast<T*>(emulator::dynamic_shared_memory());
#else
  // One name and one type for all kernels: two extern arrays of different types cannot coexist.
  extern __shared__ __align__(16) unsigned char fused_dynamic_shared_memory[];
  return reinterpret_cast<T*>(fused_dynamic_shared_memory);
#endif
}

#ifndef FUSED_EMULATED
namespace detail {

// A positive number that the driver says of each device. Launchers ask every time, the driver is
// asked once.
class DeviceNumber {
 public:
  // That of the current device by ask(device, &number), `unknown` where that fails.
  template <class Ask>
  int of_current(const Ask& ask, int unknown) {
    int device = 0, number = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && device < kDevices) {
      number = known_[device].load(std::memory_order_relaxed);
      if (number != 0) return number;
    }
    if (error == cudaSuccess) error = ask(device, &number);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return unknown;
    }
    if (device < kDevices) known_[device].store(number, std::memory_order_relaxed);
    return number;
  }

 private:
  static constexpr int kDevices = 64;  // those beyond are asked every time
  std::atomic<int> known_[kDevices] = {};
};

}  // namespace detail
#endif

// The architecture, times ten, whose instructions a kernel was compiled to for the current device:
// at most the device's own, and less where the build holds nothing newer. 0 where it cannot run.
template <auto kKernel>
int compiled_architecture() {
#ifdef FUSED_EMULATED
  return emulator::architecture();
#else
  static detail::DeviceNumber architecture;
  const auto ask = [](int, int* number) {
    cudaFuncAttributes attributes{};
    const auto error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel));
    *number = attributes.ptxVersion;
    return error;
  };
  return architecture.of_current(ask, 0);
#endif
}

// Of the current device; 1 where it cannot be told, and in the emulator.
inline int num_multiprocessors() {
#ifdef FUSED_EMULATED
  return 1;
#else
  static detail::DeviceNumber count;
  const auto ask = [](int device, int* number) {
    return cudaDeviceGetAttribute(number, cudaDevAttrMultiProcessorCount, device);
  };
  return count.of_current(ask, 1);
#endif
}

#ifndef FUSED_EMULATED
namespace detail {

// A failed call leaves its error behind for whoever asks next; it is ours, so take it back.
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class Values, size_t... I>
Status launch_values(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                     Values& values, std::index_sequence<I...>) {
  // One element more than needed, because an array of none is not C++.
  void* pointers[sizeof...(I) + 1] = {&std::get<I>(values)...};
  return status_of(cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes,
                                    static_cast<cudaStream_t>(stream)));
}

}  // namespace detail
#endif

// Starts kernel(args...) on the stream and does not wait for it. A grid without blocks succeeds.
// kArchitecture is the oldest one, times ten, that has what the kernel uses: by it the emulator
// limits shared memory.
template <int kArchitecture = 75, class... P, class... A>
Status launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
              const A&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter of the kernel");
  static_assert((std::is_trivially_copyable_v<std::decay_t<P>> && ...), "copied to the device");
  static_assert((sizeof(std::decay_t<P>) + ... + 0) <= 4096, "every architecture's limit");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return nullptr;
  std::tuple<std::decay_t<P>...> values(static_cast<std::decay_t<P>>(args)...);
#ifdef FUSED_EMULATED
  (void)stream;  // launches run at once and to their end, which is the order of any stream
  return emulator::launch(kArchitecture, kernel, grid, block, shared_bytes, values);
#else
  const void* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const Status raised = detail::status_of(cudaFuncSetAttribute(
        address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    if (raised) return raised;
  }
  return detail::launch_values(address, grid, block, shared_bytes, stream, values,
                               std::index_sequence_for<P...>());
#endif
}

}  // namespace fused
