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
  bool options;   // all but causality, window and scale
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
// None of them spills.
constexpr MmaSizes kMmaSizes[] = {
    {MmaPass::kForward, false, 32, 2, 64},         // 24 KB, 176 / 210, 3 / 2: a
    {MmaPass::kForward, false, 64, 2, 64},         // 48 KB, 229 / 250, 2 / 2: a
    {MmaPass::kForward, false, 96, 2, 32},         // 48 KB, 210 / 226, 2 / 2: a c
    {MmaPass::kForward, false, 128, 2, 32},        // 64 KB, 249 / 255, 2 / 2: a c
    {MmaPass::kForward, false, 192, 1, 32},        // 72 KB, 202 / 221, 2 / 2: b c
    {MmaPass::kForward, false, 256, 1, 32},        // 96 KB, 237 / 242, 1 / 2: b c
    {MmaPass::kForward, true, 32, 1, 64},          // 20 KB, 188 / 212, 2 / 2: b
    {MmaPass::kForward, true, 64, 1, 64},          // 40 KB, 198 / 244, 2 / 2: b
    {MmaPass::kForward, true, 96, 1, 32},          // 36 KB, 190 / 218, 2 / 2: b c
    {MmaPass::kForward, true, 128, 1, 32},         // 48 KB, 202 / 244, 2 / 2: b c
    {MmaPass::kForward, true, 192, 1, 32},         // 72 KB, 232 / 246, 2 / 2: b c
    {MmaPass::kForward, true, 256, 1, 16},         // 64 KB, 241 / 250, 2 / 2: b d
    {MmaPass::kQueryGradient, false, 32, 1, 64},   // 25 KB, 162 / 177, 3 / 2: b
    {MmaPass::kQueryGradient, false, 64, 1, 64},   // 49 KB, 202 / 215, 2 / 2: b
    {MmaPass::kQueryGradient, false, 96, 1, 32},   // 48 KB, 176 / 180, 2 / 2: b c
    {MmaPass::kQueryGradient, false, 128, 1, 32},  // 64 KB, 194 / 202, 2 / 2: b c
    {MmaPass::kQueryGradient, false, 192, 1, 32},  // 96 KB, 224 / 232, 1 / 2: b c
    {MmaPass::kQueryGradient, false, 256, 1, 16},  // 96 KB, 233 / 241, 1 / 2: b d
    {MmaPass::kQueryGradient, true, 32, 1, 64},    // 25 KB, 178 / 204, 3 / 2: b
    {MmaPass::kQueryGradient, true, 64, 1, 64},    // 49 KB, 208 / 240, 2 / 2: b
    {MmaPass::kQueryGradient, true, 96, 1, 32},    // 48 KB, 182 / 202, 2 / 2: b c
    {MmaPass::kQueryGradient, true, 128, 1, 32},   // 64 KB, 202 / 226, 2 / 2: b c
    {MmaPass::kQueryGradient, true, 192, 1, 32},   // 96 KB, 232 / 238, 1 / 2: b c
    {MmaPass::kQueryGradient, true, 256, 1, 16},   // 96 KB, 239 / 239, 1 / 2: b d
    {MmaPass::kKeyGradient, false, 32, 1, 64},     // 25 KB, 202 / 231, 2 / 2: b
    {MmaPass::kKeyGradient, false, 64, 1, 64},     // 49 KB, 246 / 255, 2 / 2: b
    {MmaPass::kKeyGradient, false, 96, 1, 32},     // 48 KB, 212 / 242, 2 / 2: b c
    {MmaPass::kKeyGradient, false, 128, 1, 32},    // 64 KB, 247 / 255, 2 / 2: b c
    {MmaPass::kKeyGradient, false, 192, 1, 32},    // 96 KB, 228 / 244, 1 / 2: b c
    {MmaPass::kKeyGradient, false, 256, 1, 16},    // 96 KB, 235 / 248, 1 / 2: b d
    {MmaPass::kKeyGradient, true, 32, 1, 64},      // 25 KB, 224 / 230, 2 / 2: b
    {MmaPass::kKeyGradient, true, 64, 1, 32},      // 32 KB, 203 / 230, 2 / 2: b c
    {MmaPass::kKeyGradient, true, 96, 1, 32},      // 48 KB, 229 / 232, 2 / 2: b c
    {MmaPass::kKeyGradient, true, 128, 1, 32},     // 64 KB, 254 / 247, 2 / 2: b c
    {MmaPass::kKeyGradient, true, 192, 1, 32},     // 96 KB, 238 / 238, 1 / 2: b c
    {MmaPass::kKeyGradient, true, 256, 1, 16},     // 96 KB, 241 / 241, 1 / 2: b d
};

constexpr MmaSizes find_mma_sizes(MmaPass pass, bool options, int head_dim) {
  for (const MmaSizes& row : kMmaSizes) {
    if (row.pass == pass && row.options == options && row.head_dim == head_dim) return row;
  }
  return {};  // which MmaTile refuses
}

// A row of the table for kernels.
template <MmaPass kPass, bool kOptions, int kDim>
struct MmaTile {
  static constexpr MmaSizes kSizes = find_mma_sizes(kPass, kOptions, kDim);
  static constexpr int kRowTiles = kSizes.row_tiles, kOthers = kSizes.others, kStages = kMmaStages;
  static constexpr int kThreads = 32 * kMmaWarps, kOwn = 16 * kRowTiles * kMmaWarps;
  // All that 65,536 registers have room for beyond 168 of each thread.
  static constexpr int kBlocks = 2;
  static_assert(kRowTiles > 0 && kOthers % 16 == 0, "in the table, and in whole matrix products");
};

}  // namespace fused
