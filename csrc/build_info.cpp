// What this build contains, as constants of a Python module that needs no torch to load.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace py = pybind11;

namespace {

constexpr std::uint64_t kTorchTarget = TORCH_TARGET_VERSION;

// The target packs major and minor into its two highest bytes.
std::string TorchAbi() {
  return std::to_string(kTorchTarget >> 56) + "." + std::to_string((kTorchTarget >> 48) & 0xff);
}

}  // namespace

PYBIND11_MODULE(_build_info, m, py::mod_gil_not_used()) {
  m.attr("version") = MEMDLM_VERSION;
  m.attr("torch_version") = MEMDLM_TORCH_VERSION;
  m.attr("torch_abi") = TorchAbi();
  m.attr("compiler") = MEMDLM_COMPILER;
  m.attr("cpu") = bool(MEMDLM_CPU_OPS);
  const auto architectures = py::make_tuple(MEMDLM_CUDA_ARCHITECTURES);
  m.attr("cuda") = !architectures.empty();
  m.attr("cuda_architectures") = architectures;
}
