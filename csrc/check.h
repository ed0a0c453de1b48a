// Checks of our own invariants. The Python side has validated every argument that a user can get
// wrong (with an error that names it), so a failure here is a bug of this package.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace memdlm {

// A contiguous CPU tensor of this dtype and number of elements.
inline void check_tensor(const torch::stable::Tensor& tensor, const char* name,
                         torch::headeronly::ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must have scalar type ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ",
                  tensor.numel());
}

// The same on a GPU.
inline void check_cuda_tensor(const torch::stable::Tensor& tensor, const char* name,
                              torch::headeronly::ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                      tensor.numel() == numel,
                  name, " must be contiguous on a GPU with ", numel, " elements of scalar type ",
                  static_cast<int>(dtype), ", got ", tensor.numel(), " of ",
                  static_cast<int>(tensor.scalar_type()));
}

// A matrix on the CPU whose rows are contiguous and may lie apart.
inline void check_rows(const torch::stable::Tensor& matrix, const char* name,
                       torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(matrix.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(matrix.dim() == 2 && (matrix.stride(1) == 1 || matrix.size(1) <= 1), name,
                  " must be a matrix with contiguous rows");
  STD_TORCH_CHECK(matrix.scalar_type() == dtype, name, " must have scalar type ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(matrix.scalar_type()));
}

}  // namespace memdlm
