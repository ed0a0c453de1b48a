// A low-rank update folded into the output of a frozen layer: library GEMMs only. The addition is
// in the epilogue of the last one, and the scale in that of the products with R columns, where it
// costs nothing, so that no pass over [rows, out] is left to write.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "gemm.h"

namespace memdlm {
namespace {

using torch::stable::Tensor;

Tensor transposed(const Tensor& matrix) {
  return torch::stable::transpose(matrix, matrix.dim() - 2, matrix.dim() - 1);
}

// x [(S,) L, in], base and out [(S,) L, out], A [(S,) R, in], B [(S,) out, R]; shrink
// [(S,) L, R] becomes scale * x Aᵀ.
void lora_linear(const Tensor& x, const Tensor& base, const Tensor& A, const Tensor& B,
                 double scale, const Tensor& out, const Tensor& shrink) {
  check_gemm_operand(base, "base", x, x.dim());
  check_gemm_operand(A, "A", x, x.dim());
  check_gemm_operand(B, "B", x, x.dim());
  check_gemm_operand(out, "out", x, x.dim());
  check_gemm_operand(shrink, "shrink", x, x.dim());
  multiply(shrink, 0, shrink, scale, x, transposed(A));
  multiply(out, 1, base, 1, shrink, transposed(B));
}

// A gradient is computed where its tensor is given; grad_shrink [(S,) L, R] is scratch.
void lora_linear_backward(const Tensor& grad_out, const std::optional<Tensor>& x,
                          const std::optional<Tensor>& shrink, const Tensor& A, const Tensor& B,
                          double scale, const Tensor& grad_shrink,
                          const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_A,
                          const std::optional<Tensor>& grad_B) {
  check_gemm_operand(A, "A", grad_out, grad_out.dim());
  check_gemm_operand(B, "B", grad_out, grad_out.dim());
  STD_TORCH_CHECK(!grad_A || x, "grad_A needs x");
  STD_TORCH_CHECK(!grad_B || shrink, "grad_B needs shrink");
  if (grad_x || grad_A) multiply(grad_shrink, 0, grad_shrink, scale, grad_out, B);
  if (grad_x) multiply(*grad_x, 0, *grad_x, 1, grad_shrink, A);
  if (grad_A) multiply(*grad_A, 0, *grad_A, 1, transposed(grad_shrink), *x);
  if (grad_B) multiply(*grad_B, 0, *grad_B, 1, transposed(grad_out), *shrink);
}

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
}

}  // namespace
}  // namespace memdlm
