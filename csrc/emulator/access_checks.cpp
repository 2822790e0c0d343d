// What g++ calls when an access that -fsanitize=alignment,bounds instruments goes wrong. Kernel
// source is compiled with the flag and linked with these in place of libubsan, so that a misaligned
// vector access, on which a GPU traps, becomes an error of the launch.
#include <cstdint>

#include "emulator/runtime.h"

namespace {

// The layouts that the compilers emit (compiler-rt, lib/ubsan/ubsan_value.h and ubsan_handlers.h).
struct Location {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];  // and on, zero-terminated; GCC puts quotes around it
};
struct Mismatch {
  Location location;
  const Type* type;
  uint8_t log_alignment, access;
};
struct OutOfBounds {
  Location location;
  const Type* array_type;
  const Type* index_type;
};

}  // namespace

// Host code of a .cu file is instrumented too, and there is no launch to fail there: it goes on, as
// it would have without the flag.
extern "C" {

__attribute__((visibility("hidden"))) void __ubsan_handle_type_mismatch_v1(Mismatch* data,
                                                                           uintptr_t address) {
  if (!fused::emulator::current_block) return;
  fused::emulator::fail(
      "misaligned access at %s:%u: %s at address %#lx, which must be a multiple of "
      "%d",
      data->location.file, data->location.line, data->type->name,
      static_cast<unsigned long>(address), 1 << data->log_alignment);
}

__attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(OutOfBounds* data,
                                                                        uintptr_t index) {
  if (!fused::emulator::current_block) return;
  fused::emulator::fail("index out of bounds at %s:%u: %ld in %s", data->location.file,
                        data->location.line, static_cast<long>(index), data->array_type->name);
}

}  // extern "C"
