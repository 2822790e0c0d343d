// Matrix products in the LSTM's glue: the library's, or on the CPU our own (lstm_product.h).
#pragma once

#include <ATen/core/Tensor.h>

namespace fused {

// The right-hand factor B [k, n] of one product or, as recurrent weights are, of many.
class Factor {
 public:
  // `rows` is how many rows of left-hand factors it will meet in all: few are not worth packing B.
  Factor(const at::Tensor& b, int64_t rows);

  at::Tensor product(const at::Tensor& a) const;                // A B
  void assign(const at::Tensor& c, const at::Tensor& a) const;  // C = A B
  void add(const at::Tensor& c, const at::Tensor& a) const;     // C += A B

 private:
  void run(const at::Tensor& c, const at::Tensor& a, bool accumulate) const;

  at::Tensor b_;
  at::Tensor packed_;  // undefined where the library multiplies
};

// A B, once.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return Factor(b, a.size(0)).product(a);
}

}  // namespace fused
