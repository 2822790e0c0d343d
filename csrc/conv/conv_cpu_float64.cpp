#include "conv/conv_cpu_kernels.inl"

template struct fused::ConvCpu<double>;
