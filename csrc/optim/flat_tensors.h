// Turns tensors into flat arrays that a kernel can walk: brings the operands of a parameter into
// one dense layout and remembers what to copy back. For the glue, which knows torch.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fused {

// Parameter i's operands share one memory order: that of the parameter where it is dense, else a
// contiguous copy's. Copies are allocated when they are asked for and filled by fill(), so that the
// steps of several groups can be made ready, which may fail, before the first of them is made.
// Nothing that the caller can see is written before finish(). The tensors given must outlive this
// object: a step over hundreds of small ones would notice every reference count.
class FlatTensors {
 public:
  explicit FlatTensors(size_t num_params) { written_.reserve(5 * num_params); }

  // The parameter's array. Sets the layout that operand() asks of the others.
  void* param(const at::Tensor& param);

  // The array of a tensor of the parameter's shape, in the parameter's layout; copied where its
  // own layout differs, or always. `written`: the kernel will change it.
  void* operand(const at::Tensor& tensor, bool written, bool always_copied = false);

  // The array of a tensor by itself, in whatever order is its own.
  void* read_only(const at::Tensor& tensor);

  // The array of a contiguous tensor of another shape that the step changes: a count, scales.
  void* whole(const at::Tensor& tensor);

  // Marks what the kernel will change, for autograd's check of stale graphs.
  void bump_versions() const;

  // Whether every array is a tensor's own memory.
  bool has_no_copies() const { return copies_.empty() && temporaries_.empty(); }

  // Before the kernel: gives copies their values.
  void fill() const;

  // After the kernel: writes copies back to where they came from.
  void finish() const;

 private:
  const at::Tensor* layout_ = nullptr;      // of the current parameter; dense
  at::Tensor layout_copy_;                  // owns it where the parameter itself is not dense
  std::vector<const at::Tensor*> written_;  // as the caller knows them
  struct Copy {
    at::Tensor original, copy;
    bool is_written;
  };
  std::vector<Copy> copies_;
  std::vector<at::Tensor> temporaries_;  // what read_only() copied, kept until the end
};

}  // namespace fused
