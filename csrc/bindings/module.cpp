// The Python module: loading it registers the kernels; it states how it was built.

// torch 2.11 guards every header it ships against this macro, the copy of pybind11 too. Nothing of torch is called here.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#if defined(__clang__)
#define MTU_FAST_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define MTU_FAST_COMPILER "gcc " __VERSION__
#else
#define MTU_FAST_COMPILER "unknown"
#endif

namespace {

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["compiler"] = MTU_FAST_COMPILER;
  facts["flags"] = MTU_FAST_FLAGS;
  facts["sources"] = MTU_FAST_SOURCES;
  facts["torch (headers)"] = TORCH_VERSION;
  facts["torch (oldest served)"] = MTU_FAST_TORCH_TARGET;
#ifdef MTU_FAST_CUDA
  facts["cuda"] = MTU_FAST_CUDA;
#else
  facts["cuda"] = MTU_FAST_NO_CUDA;
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of mtu_fast; importing this module registers them with torch's dispatcher.";
  m.def("build_facts", &build_facts, "How this binary was built.");
}
