// The emulator's controls for Python: bind() adds the submodule `emulator` to the emulated module.
#pragma once

#include <pybind11/pybind11.h>

namespace fused::emulator {

void bind(pybind11::module_& module);

}  // namespace fused::emulator
