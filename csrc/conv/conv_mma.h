// Convolution on tensor cores (mma.sync, from sm_80 on), in float16 and bfloat16, and in float32
// where its products may be in tf32: which problems take it, and its launchers. Depthwise
// convolutions, which are no matrix products, have kernels of their own.
#pragma once

#include "conv/correlation.h"

namespace fused {

// Whether the tensor-core kernels run this problem on the current device.
bool conv_mma_supported(const Correlation& c);

// The forward pass, or the gradient of the input. `room` is that for the weight laid out anew,
// conv_packed_elements() of them.
Status conv_mma_correlate(const Correlation& c, bool channels_last, void* room, Stream stream);

// The shares of the gradient of the weight, of the correlation that the forward pass is: as
// conv_backward_weight_kernel leaves them.
Status conv_mma_backward_weight(const Correlation& c, bool channels_last, int32_t splits,
                                float* partials, Stream stream);

}  // namespace fused
