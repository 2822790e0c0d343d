#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace fused {
namespace {

bool cpu_has(Isa isa) {
#if FUSED_X86
  // f16c has no name in g++ 12's __builtin_cpu_supports; every CPU with AVX2 and FMA has it.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return false;
#else
  return isa == Isa::kGeneric;
#endif
}

Isa choose() {
  constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kGeneric};
  const char* wanted = std::getenv("FUSED_ISA");
  for (Isa isa : kBestFirst) {
    if (cpu_has(isa) && (wanted == nullptr || std::strcmp(wanted, isa_name(isa)) == 0)) return isa;
  }
  // An unknown name, or a set this CPU lacks: the widest that it has.
  for (Isa isa : kBestFirst) {
    if (cpu_has(isa)) return isa;
  }
  return Isa::kGeneric;
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

}  // namespace fused
