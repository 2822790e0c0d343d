// A sum, and beside it what is rounded off it (two-sum: Knuth, The Art of Computer Programming,
// volume 2, 4.2.2): as if with twice the digits, whatever the order and however much cancels.
#pragma once

#include "common/dtype.h"

namespace fused {

template <typename A>
struct CompensatedSum {
  A sum = 0, rounded_off = 0;

  FUSED_HOST_DEVICE void add(A term) {
    const A next = sum + term, added = next - sum;
    rounded_off += (sum - (next - added)) + (term - added);
    sum = next;
  }
  FUSED_HOST_DEVICE void add(const CompensatedSum& other) {
    rounded_off += other.rounded_off;
    add(other.sum);
  }
  FUSED_HOST_DEVICE A total() const {
    return rounded_off == rounded_off ? sum + rounded_off : sum;  // NaN, if the sum is infinite
  }
};

}  // namespace fused
