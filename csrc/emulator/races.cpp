// What must be ordered, and by what, follows the CUDA programming guide:
//   - threads of one block, by __syncthreads;
//   - those of one named barrier, by it: what came before any arrival, before what follows a wait;
//   - lanes of one warp, by __syncwarp over both: shuffles, votes and matrix products do not order
//     memory;
//   - two blocks of one launch, by nothing (the pattern "last block done" would need the fences
//     that it uses to be modelled: no kernel here has it);
//   - atomics do not conflict with each other.
// Launches are ordered by their stream.
#ifdef FUSED_EMULATOR_RACES

#include "emulator/races.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulator/control.h"
#include "emulator/fiber.h"
#include "emulator/thread_clocks.h"

namespace fused::emulator {
namespace {

enum class Kind : uint8_t { kRead, kWrite };

struct Access {
  uint64_t block;
  uint32_t epoch;  // barriers that the block had passed
  uint16_t clock;  // lesser barriers that the thread had passed since, and one; 0: no access
  uint16_t thread;
  const void* where;
  bool is_atomic;
};

// All that later accesses to some bytes must be compared with. A write is ordered after everything
// before it, or reported: what it replaces is never needed again. Of many readers that nothing
// orders, any two stand for all, save for those that a warp barrier orders: hence a few more.
struct Cell {
  Access write;
  std::array<Access, 4> reads;
};

constexpr size_t kPageBytes = 256;
constexpr size_t kWidestAccess = 16;

// The cells of kPageBytes bytes of memory: wide at first, and split in two as often as an access
// needs it that does not cover them whole. Two threads that write neighbouring bytes do not race.
class Page {
 public:
  Cell& covering(uintptr_t address, size_t size) {
    while (address % bytes_per_cell_ != 0 || size < bytes_per_cell_) split();
    return cells_[address % kPageBytes / bytes_per_cell_];
  }
  size_t bytes_per_cell() const { return bytes_per_cell_; }

 private:
  void split() {
    std::vector<Cell> halves(2 * cells_.size());
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = cells_[i / 2];
    cells_ = std::move(halves);
    bytes_per_cell_ /= 2;
  }

  size_t bytes_per_cell_ = kWidestAccess;
  std::vector<Cell> cells_ = std::vector<Cell>(kPageBytes / kWidestAccess);
};

class Races {
 public:
  void begin_launch() {
    static_shared_ = this_threads_variables();
    pages_.clear();
    last_page_ = nullptr;
  }
  void begin_block(const Stacks& stacks, size_t shared_bytes, uint64_t block_rank) {
    stacks_ = &stacks;
    shared_bytes_ = shared_bytes;
    block_ = block_rank;
    epoch_ = 0;
    begin_epoch();
  }
  void at_barrier() {
    ++epoch_;
    begin_epoch();
  }
  void at_warp_barrier(unsigned warp, unsigned mask) { clocks_.meet(int(warp), mask); }
  void arrive(int barrier, unsigned thread) { clocks_.arrive(int(thread), arrived_[barrier]); }
  void leave(int barrier, unsigned thread) { clocks_.leave(int(thread), arrived_[barrier]); }
  void reset(int barrier) { arrived_[barrier].clear(); }
  void access(uintptr_t address, size_t size, Kind kind, bool is_atomic, const void* where);

 private:
  void begin_epoch() {
    clocks_.reset();
    for (auto& row : arrived_) std::fill(row.begin(), row.end(), 0);
  }
  bool in_shared_memory(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(current_block->shared) < shared_bytes_ ||
           address - static_shared_.begin < static_shared_.size;
  }
  bool ordered(const Access& before, const Access& now, bool in_shared) const;
  Page& page_at(uintptr_t address);
  void remember_read(Cell& cell, const Access& now, bool in_shared) const;
  [[noreturn]] void report(uintptr_t address, const Access& before, Kind kind_before,
                           const Access& now, Kind kind) const;

  const Stacks* stacks_ = nullptr;
  size_t shared_bytes_ = 0;
  Range static_shared_;
  uint64_t block_ = 0;
  uint32_t epoch_ = 0;
  ThreadClocks clocks_;
  std::array<ThreadClocks::Row, kNamedBarriers> arrived_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_address_ = 0;
  Page* last_page_ = nullptr;
};

bool Races::ordered(const Access& before, const Access& now, bool in_shared) const {
  if (before.clock == 0 || (before.is_atomic && now.is_atomic)) return true;
  if (before.block != now.block) return in_shared;  // another block's memory, at the same place
  if (before.thread == now.thread || before.epoch != now.epoch) return true;
  return clocks_.seen(now.thread, before.thread) >= before.clock;
}

Page& Races::page_at(uintptr_t address) {
  const uintptr_t page_address = address / kPageBytes;
  if (!last_page_ || page_address != last_page_address_) {
    auto& page = pages_[page_address];
    if (!page) page = std::make_unique<Page>();
    last_page_ = page.get();
    last_page_address_ = page_address;
  }
  return *last_page_;
}

void Races::remember_read(Cell& cell, const Access& now, bool in_shared) const {
  for (Access& read : cell.reads) {
    const bool mine = read.block == now.block && read.thread == now.thread;
    if (read.clock == 0 || mine || (!now.is_atomic && ordered(read, now, in_shared))) {
      read = now;
      return;
    }
  }
  cell.reads.back() = now;
}

void Races::access(uintptr_t address, size_t size, Kind kind, bool is_atomic, const void* where) {
  if (!current_thread || stacks_->contains(address)) return;
  const bool in_shared = in_shared_memory(address);
  const auto thread = static_cast<uint16_t>(current_thread->rank);
  const Access now{block_, epoch_, clocks_.own(thread), thread, where, is_atomic};
  for (uintptr_t at = address, end = address + size; at < end;) {
    Page& page = page_at(at);
    Cell& cell = page.covering(at, end - at);
    if (!ordered(cell.write, now, in_shared)) report(at, cell.write, Kind::kWrite, now, kind);
    if (kind == Kind::kRead) {
      remember_read(cell, now, in_shared);
    } else {
      for (const Access& read : cell.reads) {
        if (!ordered(read, now, in_shared)) report(at, read, Kind::kRead, now, kind);
      }
      cell.write = now;
      cell.reads = {};
    }
    at += page.bytes_per_cell();
  }
}

// "file.cuh:123" by binutils' addr2line, which comes with the compiler; else the bare address.
void describe(const void* where, char* text, size_t size) {
  Dl_info info;
  if (!dladdr(where, &info)) {
    std::snprintf(text, size, "%p", where);
    return;
  }
  // The hook returns behind the access.
  const auto offset =
      static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(text, size, "%s+%#lx", info.dli_fname, static_cast<unsigned long>(offset));
  char command[1024];
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' %#lx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long>(offset));
  FILE* pipe = popen(command, "r");
  if (!pipe) return;
  char line[256];
  if (std::fgets(line, sizeof line, pipe) && line[0] != '?') {
    line[std::strcspn(line, " \n")] = '\0';
    std::snprintf(text, size, "%s", line);
  }
  pclose(pipe);
}

void Races::report(uintptr_t address, const Access& before, Kind kind_before, const Access& now,
                   Kind kind) const {
  const dim3 dim = current_block->dim, grid = current_block->grid_dim;
  char here[512], there[512], memory[64];
  describe(now.where, here, sizeof here);
  describe(before.where, there, sizeof there);
  const auto offset = address - reinterpret_cast<uintptr_t>(current_block->shared);
  if (offset < shared_bytes_) {
    std::snprintf(memory, sizeof memory, "byte %zu of shared memory", size_t(offset));
  } else {
    std::snprintf(memory, sizeof memory, "address %#zx", size_t(address));
  }
  const uint64_t block = before.block;
  fail(
      "race: %s %s at %s, which thread (%u, %u, %u) of block (%u, %u, %u) %s at %s with no "
      "barrier between",
      kind == Kind::kWrite ? "writes" : "reads", memory, here, before.thread % dim.x,
      before.thread / dim.x % dim.y, before.thread / dim.x / dim.y, unsigned(block % grid.x),
      unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y),
      kind_before == Kind::kWrite ? "wrote" : "read", there);
}

Races& races() {
  static Races* const races = new Races;
  return *races;
}

}  // namespace

void races_begin_launch() { races().begin_launch(); }
void races_begin_block(const Stacks& stacks, size_t shared_bytes, uint64_t block_rank) {
  races().begin_block(stacks, shared_bytes, block_rank);
}
void races_at_barrier() { races().at_barrier(); }
void races_at_warp_barrier(unsigned warp, unsigned mask) { races().at_warp_barrier(warp, mask); }
void races_arrive_at_named_barrier(int id, unsigned thread) { races().arrive(id, thread); }
void races_leave_named_barrier(int id, unsigned thread) { races().leave(id, thread); }
void races_reset_named_barrier(int id) { races().reset(id); }

// For race_hooks.cpp, which is called by the compiler.
void race_read(const void* address, size_t size, bool is_atomic, const void* where) {
  races().access(reinterpret_cast<uintptr_t>(address), size, Kind::kRead, is_atomic, where);
}
void race_write(const void* address, size_t size, bool is_atomic, const void* where) {
  races().access(reinterpret_cast<uintptr_t>(address), size, Kind::kWrite, is_atomic, where);
}

}  // namespace fused::emulator

#endif  // FUSED_EMULATOR_RACES
