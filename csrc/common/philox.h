// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): 128 random bits as a pure function of a 64-bit key and a 128-bit counter, the
// same bits on every backend.
#pragma once

#include "common/dtype.h"

namespace fused {

struct Philox4 {
  uint32_t x, y, z, w;
};

FUSED_HOST_DEVICE Philox4 philox4x32_10(uint64_t key, Philox4 counter) {
  constexpr uint32_t kMultiplierX = 0xD2511F53u, kMultiplierZ = 0xCD9E8D57u;
  constexpr uint32_t kWeylX = 0x9E3779B9u, kWeylY = 0xBB67AE85u;
  uint32_t key_x = static_cast<uint32_t>(key), key_y = static_cast<uint32_t>(key >> 32);
  Philox4 c = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_x = static_cast<uint64_t>(kMultiplierX) * c.x;
    const uint64_t product_z = static_cast<uint64_t>(kMultiplierZ) * c.z;
    c = Philox4{
        static_cast<uint32_t>(product_z >> 32) ^ c.y ^ key_x, static_cast<uint32_t>(product_z),
        static_cast<uint32_t>(product_x >> 32) ^ c.w ^ key_y, static_cast<uint32_t>(product_x)};
    key_x += kWeylX;
    key_y += kWeylY;
  }
  return c;
}

}  // namespace fused
