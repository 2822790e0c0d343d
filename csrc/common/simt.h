// The CUDA language for kernel source: the toolkit's own, or the emulator's when g++ compiles the
// very same source with -DFUSED_EMULATED (docs/emulator.md).
#pragma once

#ifdef FUSED_EMULATED
#include "emulator/simt.h"
#else
#include <cuda_runtime.h>
#endif
