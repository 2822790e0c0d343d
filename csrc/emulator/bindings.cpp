#include "emulator/bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "emulator/capture.h"
#include "emulator/control.h"

namespace fused::emulator {
namespace {

Order order_named(const std::string& name) {
  if (name == "forward") return Order::kForward;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw pybind11::value_error("emulator: order must be forward, reverse or random, got " + name);
}

void configure(const std::string& order, uint64_t seed, size_t shared_limit, int num_os_threads,
               int architecture) {
  set_settings({order_named(order), seed, shared_limit, num_os_threads, architecture});
}

void run_captured(const CapturedLaunches& launches, size_t begin, size_t end) {
  if (const Status failed = launches.run(begin, end)) throw std::runtime_error(failed);
}

}  // namespace

void bind(pybind11::module_& module) {
  namespace py = pybind11;
  py::module_ emulator = module.def_submodule("emulator");
  emulator.def("configure", &configure, py::kw_only(), py::arg("order"), py::arg("seed"),
               py::arg("shared_limit"), py::arg("num_os_threads"), py::arg("architecture"));
  emulator.def("launch_counts", &launch_counts);
  emulator.def("instances_of", &instances_of, py::arg("names"));
  emulator.def("begin_capture", &begin_capture);
  emulator.def("is_capturing", &is_capturing);
  emulator.def("num_captured", &num_captured);
  emulator.def("end_capture", &end_capture);
  py::class_<CapturedLaunches>(emulator, "CapturedLaunches")
      .def("run", &run_captured, py::arg("begin"), py::arg("end"));
}

}  // namespace fused::emulator
