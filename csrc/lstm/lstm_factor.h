// Matrix products in the LSTM's glue: the library's, or on the CPU our own (lstm_product.h).
#pragma once

#include <ATen/core/Tensor.h>

namespace fused {

// Row `row` of a matrix, to be written, or only to be read. Reading leaves a lazily copied tensor
// as it is, which threads of a parallel region may not have copied.
inline void* row_pointer(const at::Tensor& matrix, int64_t row) {
  return static_cast<char*>(matrix.mutable_data_ptr()) +
         row * matrix.stride(0) * matrix.element_size();
}
inline const void* const_row_pointer(const at::Tensor& matrix, int64_t row) {
  return static_cast<const char*>(matrix.const_data_ptr()) +
         row * matrix.stride(0) * matrix.element_size();
}

// Rows [first, first + count) of a matrix.
struct Rows {
  const at::Tensor& matrix;
  int64_t first, count;

  at::Tensor narrow() const { return matrix.narrow(0, first, count); }
};

// The right-hand factor B [k, n] of one product or, as recurrent weights are, of many.
class Factor {
 public:
  // How many rows of left-hand factors it will meet in all, and in how many products: few are not
  // worth packing B.
  Factor(const at::Tensor& b, int64_t rows, int64_t products);

  at::Tensor product(const at::Tensor& a) const;    // A B
  void assign(const Rows& c, const Rows& a) const;  // C = A B
  void add(const Rows& c, const Rows& a) const;     // C += A B

  // What B takes packed. 0 where the library multiplies: our own products alone may be run by the
  // threads of a parallel region side by side.
  int64_t packed_bytes() const { return packed_.defined() ? packed_.numel() : 0; }

 private:
  void run(const Rows& c, const Rows& a, bool accumulate) const;

  at::Tensor b_;
  at::Tensor packed_;  // undefined where the library multiplies
};

// A B, once.
inline at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return Factor(b, a.size(0), 1).product(a);
}

}  // namespace fused
