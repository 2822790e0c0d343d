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
//   e  spills all the same, up to 80 bytes: from sm_90a on addresses are reloaded once for each
//      tile. Half the rows again did not help, and would double the softmax's part
constexpr MmaSizes kMmaSizes[] = {
    {MmaPass::kForward, false, 32, 2, 64},         // 24 KB, 165 / 204, 3 / 2: a
    {MmaPass::kForward, false, 64, 2, 64},         // 48 KB, 222 / 246, 2 / 2: a
    {MmaPass::kForward, false, 96, 2, 32},         // 48 KB, 214 / 232, 2 / 2: a c
    {MmaPass::kForward, false, 128, 2, 32},        // 64 KB, 250 / 255, 2 / 2: a c e
    {MmaPass::kForward, false, 192, 1, 32},        // 72 KB, 199 / 245, 2 / 2: b c
    {MmaPass::kForward, false, 256, 1, 32},        // 96 KB, 237 / 255, 1 / 2: b c e
    {MmaPass::kForward, true, 32, 1, 64},          // 20 KB, 186 / 208, 2 / 2: b
    {MmaPass::kForward, true, 64, 1, 64},          // 40 KB, 190 / 252, 2 / 2: b
    {MmaPass::kForward, true, 96, 1, 32},          // 36 KB, 186 / 236, 2 / 2: b c
    {MmaPass::kForward, true, 128, 1, 32},         // 48 KB, 196 / 246, 2 / 2: b c
    {MmaPass::kForward, true, 192, 1, 32},         // 72 KB, 232 / 250, 2 / 2: b c
    {MmaPass::kForward, true, 256, 1, 16},         // 64 KB, 255 / 255, 2 / 2: b d
    {MmaPass::kQueryGradient, false, 32, 1, 64},   // 25 KB, 162 / 174, 3 / 2: b
    {MmaPass::kQueryGradient, false, 64, 1, 64},   // 49 KB, 197 / 210, 2 / 2: b
    {MmaPass::kQueryGradient, false, 96, 1, 32},   // 48 KB, 171 / 185, 2 / 2: b c
    {MmaPass::kQueryGradient, false, 128, 1, 32},  // 64 KB, 186 / 210, 2 / 2: b c
    {MmaPass::kQueryGradient, false, 192, 1, 32},  // 96 KB, 217 / 244, 1 / 2: b c
    {MmaPass::kQueryGradient, false, 256, 1, 16},  // 96 KB, 229 / 252, 1 / 2: b d
    {MmaPass::kQueryGradient, true, 32, 1, 64},    // 25 KB, 166 / 200, 3 / 2: b
    {MmaPass::kQueryGradient, true, 64, 1, 64},    // 49 KB, 201 / 234, 2 / 2: b
    {MmaPass::kQueryGradient, true, 96, 1, 32},    // 48 KB, 182 / 210, 2 / 2: b c
    {MmaPass::kQueryGradient, true, 128, 1, 32},   // 64 KB, 196 / 220, 2 / 2: b c
    {MmaPass::kQueryGradient, true, 192, 1, 32},   // 96 KB, 228 / 237, 1 / 2: b c
    {MmaPass::kQueryGradient, true, 256, 1, 16},   // 96 KB, 238 / 242, 1 / 2: b d
    {MmaPass::kKeyGradient, false, 32, 1, 64},     // 25 KB, 188 / 212, 2 / 2: b
    {MmaPass::kKeyGradient, false, 64, 1, 64},     // 49 KB, 227 / 242, 2 / 2: b
    {MmaPass::kKeyGradient, false, 96, 1, 32},     // 48 KB, 211 / 241, 2 / 2: b c
    {MmaPass::kKeyGradient, false, 128, 1, 32},    // 64 KB, 241 / 255, 2 / 2: b c e
    {MmaPass::kKeyGradient, false, 192, 1, 32},    // 96 KB, 210 / 248, 1 / 2: b c
    {MmaPass::kKeyGradient, false, 256, 1, 16},    // 96 KB, 223 / 255, 1 / 2: b d e
    {MmaPass::kKeyGradient, true, 32, 1, 64},      // 25 KB, 208 / 234, 2 / 2: b
    {MmaPass::kKeyGradient, true, 64, 1, 32},      // 32 KB, 194 / 236, 2 / 2: b c
    {MmaPass::kKeyGradient, true, 96, 1, 32},      // 48 KB, 221 / 236, 2 / 2: b c
    {MmaPass::kKeyGradient, true, 128, 1, 32},     // 64 KB, 250 / 255, 2 / 2: b c e
    {MmaPass::kKeyGradient, true, 192, 1, 32},     // 96 KB, 216 / 236, 1 / 2: b c
    {MmaPass::kKeyGradient, true, 256, 1, 16},     // 96 KB, 229 / 234, 1 / 2: b d
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
