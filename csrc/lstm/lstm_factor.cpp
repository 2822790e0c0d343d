#include "lstm/lstm_factor.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "common/checks.h"
#include "common/isa.h"
#include "lstm/lstm_product.h"

namespace fused {
namespace {

#if !defined(FUSED_EMULATED)

// Below this many rows in one product, packing B costs more than the library's slower product; but
// in several of a few rows each the library reads B at a fraction of the rate, every time.
constexpr int64_t kRowsWorthPacking = 32;
constexpr int64_t kProductsWorthPacking = 4;

bool is_ours(const at::Tensor& b, int64_t rows, int64_t products) {
  if (!b.is_cpu() || rows == 0 || b.numel() == 0) return false;
  switch (b.scalar_type()) {
    case at::kHalf:
      return true;
    case at::kBFloat16:
    case at::kFloat:
      return (rows >= kRowsWorthPacking || products >= kProductsWorthPacking) &&
             current_isa() != Isa::kGeneric;
    default:
      return false;
  }
}

CpuMatrix cpu_matrix(const Rows& rows) {
  const at::Tensor& matrix = rows.matrix;
  return {const_row_pointer(matrix, rows.first), matrix.stride(0), matrix.stride(1),
          dtype_of("lstm", "weight", matrix)};
}

#endif

}  // namespace

Factor::Factor(const at::Tensor& b, int64_t rows, int64_t products) : b_(b) {
#if !defined(FUSED_EMULATED)
  if (!is_ours(b, rows, products)) return;
  const int64_t k = b.size(0), n = b.size(1);
  const CpuMatrix matrix = cpu_matrix({b, 0, k});
  packed_ = at::empty({packed_size_cpu(matrix.dtype, k, n)}, b.options().dtype(at::kByte));
  pack_cpu(matrix, k, n, packed_.mutable_data_ptr());
#else
  (void)rows, (void)products;
#endif
}

at::Tensor Factor::product(const at::Tensor& a) const {
#if defined(FUSED_EMULATED)
  // Stands for the GPU's library, whose order of sums is not this CPU's library's: in double, as
  // emulated tensor cores sum.
  return at::mm(a.to(at::kDouble), b_.to(at::kDouble)).to(a.scalar_type());
#endif
  if (!packed_.defined()) return at::mm(a, b_);
  const at::Tensor c = at::empty({a.size(0), b_.size(1)}, a.options());
  run({c, 0, c.size(0)}, {a, 0, a.size(0)}, false);
  return c;
}

void Factor::assign(const Rows& c, const Rows& a) const {
  if (packed_.defined()) {
    run(c, a, false);
  } else {
    at::Tensor out = c.narrow();
    at::mm_out(out, a.narrow(), b_);
  }
}

void Factor::add(const Rows& c, const Rows& a) const {
  if (packed_.defined()) {
    run(c, a, true);
  } else {
    c.narrow().addmm_(a.narrow(), b_);
  }
}

void Factor::run(const Rows& c, const Rows& a, bool accumulate) const {
#if !defined(FUSED_EMULATED)
  if (a.count == 0) return;
  product_cpu({cpu_matrix(a), packed_.const_data_ptr(), row_pointer(c.matrix, c.first),
               c.matrix.stride(0), a.count, b_.size(1), b_.size(0), accumulate});
#else
  (void)c, (void)a, (void)accumulate;
#endif
}

}  // namespace fused
