// The library's matrix product, with the addition and the scale in its epilogue.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace memdlm {

// out = beta * addend + alpha * left @ right: [M, K] @ [K, N], or one such product for each set.
// With beta 0 the addend is not read.
inline void multiply(const torch::stable::Tensor& out, double beta,
                     const torch::stable::Tensor& addend, double alpha,
                     const torch::stable::Tensor& left, const torch::stable::Tensor& right) {
  const auto gemm = left.dim() == 3 ? aoti_torch_cpu_baddbmm_out : aoti_torch_cpu_addmm_out;
  TORCH_ERROR_CODE_CHECK(gemm(out.get(), addend.get(), left.get(), right.get(), beta, alpha));
}

inline void check_gemm_operand(const torch::stable::Tensor& tensor, const char* name,
                               const torch::stable::Tensor& like, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have x's dtype");
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ",
                  tensor.dim());
}

}  // namespace memdlm
