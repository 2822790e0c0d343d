// Races as races, whatever order the threads happened to run in: every access of kernel code is
// remembered byte by byte, and two that conflict must be ordered by a barrier.
//
// Compiled in with -DFUSED_EMULATOR_RACES, together with -fsanitize=thread on kernel source, which
// makes g++ call a hook at every access; races.cpp answers in place of libtsan, which knows nothing
// of fibers, barriers or warps. Elsewhere all of this is empty.
#pragma once

#include <cstdint>

#include "emulator/runtime.h"

namespace fused::emulator {

class Stacks;

#ifdef FUSED_EMULATOR_RACES

constexpr bool kDetectRaces = true;

void races_begin_launch();
void races_begin_block(const Stacks& stacks, size_t shared_bytes, uint64_t block_rank);
void races_at_barrier();
void races_at_warp_barrier(unsigned warp, unsigned mask);
void races_arrive_at_named_barrier(int id, unsigned thread);
void races_leave_named_barrier(int id, unsigned thread);
void races_reset_named_barrier(int id);

#else

constexpr bool kDetectRaces = false;

inline void races_begin_launch() {}
inline void races_begin_block(const Stacks&, size_t, uint64_t) {}
inline void races_at_barrier() {}
inline void races_at_warp_barrier(unsigned, unsigned) {}
inline void races_arrive_at_named_barrier(int, unsigned) {}
inline void races_leave_named_barrier(int, unsigned) {}
inline void races_reset_named_barrier(int) {}

#endif

}  // namespace fused::emulator
