// The sizes of the tensor-core kernels' tiles, by pass, options and head dim.
#pragma once

namespace fused {

enum class MmaPass {
  kForward,
  kQueryGradient,  // a block owns queries
  kKeyGradient,    // it owns keys: grad_k and grad_v
};

struct MmaSizes {
  MmaPass pass;
  int bits;       // of an element
  bool options;   // all but causality, window and scale; a cache in pages too
  int head_dim;   // that the instance has room for
  int row_tiles;  // of 16 own rows for each warp
  int others;     // rows of the other operands in a tile
};

constexpr int kMmaWarps = 4;  // of a block
// Tiles of the other operands in shared memory: one to compute with, one on its way.
constexpr int kMmaStages = 2;

// Not yet timed on a GPU. Beside each row what nvcc makes of it: KB of shared memory, the most
// registers on sm_80 / from sm_90a to sm_120, blocks for which a multiprocessor of sm_80 / sm_90
// has room. What decided:
//   a  two row tiles, so that each fragment of k or v read from shared memory is used twice; with
//      one, reading takes as long as the products on sm_80, and longer on sm_90
//   b  one row tile, for two have no room in 255 registers: options cost some 40 of them, a result
//      of head_dim 192 alone takes 96 for each row tile, and the gradients of k and v two results
//   c  32 other rows instead of 64, against spills: 16 registers less for each product and row tile
//   d  and 16 instead of 32, so that a block stays below the 99 KB of sm_86, sm_89 and sm_120 (for
//      the forward pass with options against spills)
//   f  and fewer than registers have room for, so that a multiprocessor of sm_80 has two blocks
// None of them spills.
constexpr MmaSizes kMmaSizes[] = {
    {MmaPass::kForward, 16, false, 32, 2, 64},         // 24 KB, 168 / 182, 3 / 2: a
    {MmaPass::kForward, 16, false, 64, 2, 64},         // 48 KB, 227 / 239, 2 / 2: a
    {MmaPass::kForward, 16, false, 96, 2, 32},         // 48 KB, 213 / 225, 2 / 2: a c
    {MmaPass::kForward, 16, false, 128, 2, 32},        // 64 KB, 246 / 255, 2 / 2: a c
    {MmaPass::kForward, 16, false, 192, 1, 32},        // 72 KB, 205 / 218, 2 / 2: b c
    {MmaPass::kForward, 16, false, 256, 1, 32},        // 96 KB, 237 / 244, 1 / 2: b c
    {MmaPass::kForward, 16, true, 32, 1, 64},          // 20 KB, 195 / 234, 2 / 2: b
    {MmaPass::kForward, 16, true, 64, 1, 64},          // 40 KB, 236 / 248, 2 / 2: b
    {MmaPass::kForward, 16, true, 96, 1, 32},          // 36 KB, 168 / 196, 3 / 3: b c
    {MmaPass::kForward, 16, true, 128, 1, 32},         // 48 KB, 192 / 216, 2 / 2: b c
    {MmaPass::kForward, 16, true, 192, 1, 32},         // 72 KB, 222 / 242, 2 / 2: b c
    {MmaPass::kForward, 16, true, 256, 1, 16},         // 64 KB, 240 / 244, 2 / 2: b d
    {MmaPass::kQueryGradient, 16, false, 32, 1, 64},   // 24 KB, 162 / 176, 3 / 3: b
    {MmaPass::kQueryGradient, 16, false, 64, 1, 64},   // 48 KB, 203 / 215, 2 / 2: b
    {MmaPass::kQueryGradient, 16, false, 96, 1, 32},   // 48 KB, 168 / 174, 3 / 2: b c
    {MmaPass::kQueryGradient, 16, false, 128, 1, 32},  // 64 KB, 194 / 200, 2 / 2: b c
    {MmaPass::kQueryGradient, 16, false, 192, 1, 32},  // 96 KB, 226 / 234, 1 / 2: b c
    {MmaPass::kQueryGradient, 16, false, 256, 1, 16},  // 96 KB, 232 / 241, 1 / 2: b d
    {MmaPass::kQueryGradient, 16, true, 32, 1, 64},    // 24 KB, 254 / 254, 2 / 2: b
    {MmaPass::kQueryGradient, 16, true, 64, 1, 64},    // 48 KB, 245 / 254, 2 / 2: b
    {MmaPass::kQueryGradient, 16, true, 96, 1, 32},    // 48 KB, 183 / 192, 2 / 2: b c
    {MmaPass::kQueryGradient, 16, true, 128, 1, 32},   // 64 KB, 201 / 219, 2 / 2: b c
    {MmaPass::kQueryGradient, 16, true, 192, 1, 32},   // 96 KB, 244 / 246, 1 / 2: b c
    {MmaPass::kQueryGradient, 16, true, 256, 1, 16},   // 96 KB, 243 / 244, 1 / 2: b d
    {MmaPass::kKeyGradient, 16, false, 32, 1, 64},     // 25 KB, 179 / 192, 2 / 2: b
    {MmaPass::kKeyGradient, 16, false, 64, 1, 64},     // 49 KB, 236 / 238, 2 / 2: b
    {MmaPass::kKeyGradient, 16, false, 96, 1, 32},     // 48 KB, 212 / 224, 2 / 2: b c
    {MmaPass::kKeyGradient, 16, false, 128, 1, 32},    // 64 KB, 246 / 251, 2 / 2: b c
    {MmaPass::kKeyGradient, 16, false, 192, 1, 32},    // 96 KB, 228 / 242, 1 / 2: b c
    {MmaPass::kKeyGradient, 16, false, 256, 1, 16},    // 96 KB, 255 / 255, 1 / 2: b d
    {MmaPass::kKeyGradient, 16, true, 32, 1, 64},      // 25 KB, 255 / 253, 2 / 2: b
    {MmaPass::kKeyGradient, 16, true, 64, 1, 32},      // 32 KB, 222 / 223, 2 / 2: b c
    {MmaPass::kKeyGradient, 16, true, 96, 1, 32},      // 48 KB, 250 / 241, 2 / 2: b c
    {MmaPass::kKeyGradient, 16, true, 128, 1, 32},     // 64 KB, 249 / 254, 2 / 2: b c
    {MmaPass::kKeyGradient, 16, true, 192, 1, 32},     // 96 KB, 236 / 250, 1 / 2: b c
    {MmaPass::kKeyGradient, 16, true, 256, 1, 16},     // 96 KB, 242 / 243, 1 / 2: b d
    // float32, as tf32.
    {MmaPass::kForward, 32, false, 32, 2, 64},         // 48 KB, 176 / 190, 2 / 2: a
    {MmaPass::kForward, 32, false, 64, 2, 32},         // 64 KB, 177 / 188, 2 / 2: a f
    {MmaPass::kForward, 32, false, 96, 2, 16},         // 72 KB, 188 / 198, 2 / 2: a f
    {MmaPass::kForward, 32, false, 128, 2, 16},        // 96 KB, 220 / 230, 1 / 2: a d
    {MmaPass::kForward, 32, true, 32, 1, 64},          // 40 KB, 195 / 244, 2 / 2: b
    {MmaPass::kForward, 32, true, 64, 1, 64},          // 80 KB, 236 / 254, 2 / 2: b
    {MmaPass::kForward, 32, true, 96, 1, 32},          // 72 KB, 168 / 194, 2 / 3: b f
    {MmaPass::kForward, 32, true, 128, 1, 16},         // 64 KB, 154 / 172, 2 / 3: b f
    {MmaPass::kQueryGradient, 32, false, 32, 1, 64},   // 48 KB, 145 / 168, 3 / 3: b
    {MmaPass::kQueryGradient, 32, false, 64, 1, 32},   // 64 KB, 147 / 180, 2 / 2: b f
    {MmaPass::kQueryGradient, 32, false, 96, 1, 16},   // 72 KB, 172 / 224, 2 / 2: b f
    {MmaPass::kQueryGradient, 32, false, 128, 1, 16},  // 96 KB, 192 / 240, 1 / 2: b d
    {MmaPass::kQueryGradient, 32, true, 32, 1, 64},    // 48 KB, 254 / 247, 2 / 2: b
    {MmaPass::kQueryGradient, 32, true, 64, 1, 32},    // 64 KB, 168 / 198, 2 / 3: b f
    {MmaPass::kQueryGradient, 32, true, 96, 1, 16},    // 72 KB, 156 / 166, 2 / 3: b f
    {MmaPass::kQueryGradient, 32, true, 128, 1, 16},   // 96 KB, 172 / 192, 1 / 2: b d
    {MmaPass::kKeyGradient, 32, false, 32, 1, 64},     // 49 KB, 180 / 202, 2 / 2: b
    {MmaPass::kKeyGradient, 32, false, 64, 1, 32},     // 64 KB, 183 / 196, 2 / 2: b f
    {MmaPass::kKeyGradient, 32, false, 96, 1, 16},     // 72 KB, 184 / 198, 2 / 2: b f
    {MmaPass::kKeyGradient, 32, false, 128, 1, 16},    // 96 KB, 216 / 238, 1 / 2: b d
    {MmaPass::kKeyGradient, 32, true, 32, 1, 64},      // 49 KB, 252 / 253, 2 / 2: b
    {MmaPass::kKeyGradient, 32, true, 64, 1, 32},      // 64 KB, 220 / 222, 2 / 2: b f
    {MmaPass::kKeyGradient, 32, true, 96, 1, 16},      // 72 KB, 201 / 210, 2 / 2: b f
    {MmaPass::kKeyGradient, 32, true, 128, 1, 16},     // 96 KB, 233 / 240, 1 / 2: b d
};

constexpr MmaSizes find_mma_sizes(MmaPass pass, int bits, bool options, int head_dim) {
  for (const MmaSizes& row : kMmaSizes) {
    const bool same_kind = row.pass == pass && row.bits == bits && row.options == options;
    if (same_kind && row.head_dim == head_dim) return row;
  }
  return {};  // which MmaTile refuses
}

// A row of the table for kernels.
template <MmaPass kPass, typename T, bool kOptions, int kDim>
struct MmaTile {
  static constexpr MmaSizes kSizes = find_mma_sizes(kPass, 8 * sizeof(T), kOptions, kDim);
  static constexpr int kRowTiles = kSizes.row_tiles, kOthers = kSizes.others, kStages = kMmaStages;
  static constexpr int kThreads = 32 * kMmaWarps, kOwn = 16 * kRowTiles * kMmaWarps;
  // All that 65,536 registers have room for beyond 168 of each thread.
  static constexpr int kBlocks = 2;
  static_assert(kRowTiles > 0 && kOthers % 16 == 0, "in the table, and in whole matrix products");
};

}  // namespace fused
