#define FUSED_MULTIPLIES_BFLOAT16 1
#include "conv/conv_cpu_kernels.inl"

template struct fused::ConvCpu<fused::BFloat16>;
