// Text for errors without an allocation: an abandoned fiber never runs its destructors.
#pragma once

#include <cstdio>
#include <cstring>

#include "emulator/runtime.h"

namespace fused::emulator {

struct Text {
  char chars[160];
};

inline Text text_of(uint3 v) {
  Text text;
  std::snprintf(text.chars, sizeof text.chars, "(%u, %u, %u)", v.x, v.y, v.z);
  return text;
}

inline Text text_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  Text text;
  std::snprintf(text.chars, sizeof text.chars, "%s:%d", slash ? slash + 1 : site.file, site.line);
  return text;
}

}  // namespace fused::emulator
