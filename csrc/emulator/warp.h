// Warp collectives of the CUDA language over any mask: shuffles, votes, match and reduce.
//
// Stricter than the hardware where the hardware leaves the result undefined: every lane of the mask
// must call, with the same mask, and no lane may read a lane outside the mask.
#pragma once

#include <type_traits>

#include "emulator/runtime.h"

namespace fused::emulator {

template <class F>
inline void for_each_lane(unsigned mask, F&& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

template <class T>
struct ShuffleRecord {
  T value;
  int source;
  T result;
};

template <class T>
const char* combine_shuffle(void* const* records, unsigned mask) {
  const char* wrong = nullptr;
  for_each_lane(mask, [&](int lane) {
    auto& mine = *static_cast<ShuffleRecord<T>*>(records[lane]);
    if (records[mine.source]) {
      mine.result = static_cast<ShuffleRecord<T>*>(records[mine.source])->value;
    } else {
      wrong = "a lane reads from a lane that is not in the mask";
    }
  });
  return wrong;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic_v<T>, "shuffles take one arithmetic value");
  ShuffleRecord<T> record{value, source, value};
  warp_collective(name, mask, &record, combine_shuffle<T>, site);
  return record.result;
}

// Every lane brings a value and gets combine(value_of, lane, mask), where value_of(l) is lane l's.
template <class T, class F>
struct ValueRecord {
  T value;
  F combine;
  unsigned result;
};

template <class T, class F>
unsigned collect(const char* name, unsigned mask, T value, F combine, Site site) {
  using Record = ValueRecord<T, F>;
  Record record{value, combine, 0};
  warp_collective(
      name, mask, &record,
      [](void* const* records, unsigned mask) -> const char* {
        const auto value_of = [&](int lane) { return static_cast<Record*>(records[lane])->value; };
        for_each_lane(mask, [&](int lane) {
          auto& mine = *static_cast<Record*>(records[lane]);
          mine.result = mine.combine(value_of, lane, mask);
        });
        return nullptr;
      },
      site);
  return record.result;
}

inline unsigned ballot(const char* name, unsigned mask, int predicate, Site site) {
  const auto combine = [](const auto& value_of, int, unsigned mask) {
    unsigned result = 0;
    for_each_lane(mask, [&](int lane) { result |= unsigned(value_of(lane) != 0) << lane; });
    return result;
  };
  return collect(name, mask, predicate, combine, site);
}

template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F fold, Site site) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "int or unsigned");
  const auto combine = [fold](const auto& value_of, int, unsigned mask) {
    T result = value_of(__builtin_ctz(mask));
    for_each_lane(mask & (mask - 1), [&](int lane) { result = fold(result, value_of(lane)); });
    return unsigned(result);
  };
  return T(collect(name, mask, value, combine, site));
}

}  // namespace fused::emulator

#define FUSED_SITE ::fused::emulator::Site site = ::fused::emulator::here()

inline void __syncwarp(unsigned mask = 0xffffffffu, FUSED_SITE) {
  fused::emulator::warp_collective("__syncwarp", mask, &mask, nullptr, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, FUSED_SITE) {
  const int lane = int(fused::emulator::lane_id());
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return fused::emulator::shuffle("__shfl_sync", mask, value, from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FUSED_SITE) {
  const int lane = int(fused::emulator::lane_id());
  const int from = (lane & (width - 1)) >= int(delta) ? lane - int(delta) : lane;
  return fused::emulator::shuffle("__shfl_up_sync", mask, value, from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FUSED_SITE) {
  const int lane = int(fused::emulator::lane_id());
  const int from = (lane & (width - 1)) + int(delta) < width ? lane + int(delta) : lane;
  return fused::emulator::shuffle("__shfl_down_sync", mask, value, from, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FUSED_SITE) {
  const int lane = int(fused::emulator::lane_id());
  const int from = (lane ^ lane_mask) < (lane & ~(width - 1)) + width ? lane ^ lane_mask : lane;
  return fused::emulator::shuffle("__shfl_xor_sync", mask, value, from, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, FUSED_SITE) {
  return fused::emulator::ballot("__ballot_sync", mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, FUSED_SITE) {
  return fused::emulator::ballot("__any_sync", mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FUSED_SITE) {
  return fused::emulator::ballot("__all_sync", mask, predicate, site) == mask;
}
// Which lanes are active together is the hardware's choice; the least it may say is oneself.
inline unsigned __activemask() { return 1u << fused::emulator::lane_id(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, FUSED_SITE) {
  const auto combine = [](const auto& value_of, int lane, unsigned mask) {
    unsigned equal = 0;
    fused::emulator::for_each_lane(
        mask, [&](int other) { equal |= unsigned(value_of(other) == value_of(lane)) << other; });
    return equal;
  };
  return fused::emulator::collect("__match_any_sync", mask, value, combine, site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, FUSED_SITE) {
  *predicate = __match_any_sync(mask, value, site) == mask;
  return *predicate ? mask : 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, FUSED_SITE) {
  const auto add = [](T a, T b) { return T(unsigned(a) + unsigned(b)); };
  return fused::emulator::reduce("__reduce_add_sync", mask, value, add, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, FUSED_SITE) {
  const auto least = [](T a, T b) { return a < b ? a : b; };
  return fused::emulator::reduce("__reduce_min_sync", mask, value, least, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, FUSED_SITE) {
  const auto most = [](T a, T b) { return a < b ? b : a; };
  return fused::emulator::reduce("__reduce_max_sync", mask, value, most, site);
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, FUSED_SITE) {
  const auto both = [](unsigned a, unsigned b) { return a & b; };
  return fused::emulator::reduce("__reduce_and_sync", mask, value, both, site);
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, FUSED_SITE) {
  const auto either = [](unsigned a, unsigned b) { return a | b; };
  return fused::emulator::reduce("__reduce_or_sync", mask, value, either, site);
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, FUSED_SITE) {
  const auto differ = [](unsigned a, unsigned b) { return a ^ b; };
  return fused::emulator::reduce("__reduce_xor_sync", mask, value, differ, site);
}

#undef FUSED_SITE
