// What runs here: instruction sets, kernels, threads.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "kernels/registry.h"

namespace pared {

void register_info(py::module_& m) {
  m.def("isa", [] { return std::string(isa_name(active_isa())); });
  m.def(
      "set_isa", [](const std::string& name) { return std::string(isa_name(set_active_isa(name))); },
      py::arg("name"));
  m.def("supported_isas", [] {
    std::vector<std::string> out;
    for (Isa isa : supported_isas()) out.emplace_back(isa_name(isa));
    return out;
  });
  m.def("kernels", [] {
    py::list out;
    for (const KernelInfo& k : all_kernels()) {
      py::dict d;
      d["name"] = k.name;
      d["op"] = k.op;
      d["isa"] = k.isa;
      d["doc"] = k.doc;
      d["supported"] = k.supported;
      out.append(d);
    }
    return out;
  });
  m.def("take_dispatched", &take_dispatched);
  m.def("num_threads", &num_threads);
  m.def("parallel_backend", [] { return std::string(parallel_backend()); });
  m.def("set_parallel_backoff", &set_parallel_backoff, py::arg("on"));
  m.def("parallel_owed", &parallel_owed);
  m.def("cpu_brand", &cpu_brand);
}

}  // namespace pared
