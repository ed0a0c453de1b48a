// Low-rank updates of experts, each on its own rows, folded into the output of their frozen layers.
// The rows are shared out evenly and every thread calls the library on its own, so neither many
// small groups nor one large one leaves a thread idle; as in lora_linear.cpp, the addition and the
// scale are in the products' epilogues.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "check.h"
#include "gemm.h"

namespace memdlm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 32;  // rows: less is not worth waking a thread for

// A matrix inside a tensor. To cut it is arithmetic, where narrow and transpose would each go
// through the dispatcher; only the call of the library makes a tensor of it.
struct Matrix {
  const Tensor& home;
  int64_t offset, rows, columns, row_stride, column_stride;  // offset: from home's first element

  Matrix row_range(int64_t begin, int64_t end) const {
    return {home, offset + begin * row_stride, end - begin, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t begin, int64_t end) const {
    return {home, offset + begin * column_stride, rows, end - begin, row_stride, column_stride};
  }
  Matrix transposed() const { return {home, offset, columns, rows, column_stride, row_stride}; }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(home.get(), 2, sizes, strides, offset, &handle));
    return Tensor(handle);
  }
};

// out = alpha * left @ right.
void write_product(const Matrix& out, double alpha, const Matrix& left, const Matrix& right) {
  const Tensor result = out.tensor();
  multiply(result, 0, result, alpha, left.tensor(), right.tensor());
}

// out = addend + left @ right.
void write_sum(const Matrix& out, const Matrix& addend, const Matrix& left, const Matrix& right) {
  multiply(out.tensor(), 1, addend.tensor(), 1, left.tensor(), right.tensor());
}

// Rows [begin, end) go through this expert's fast weights, in this sequence's set.
struct Group {
  int64_t expert, sequence, begin, end;
};

std::vector<Group> make_groups(const Tensor& offsets, int64_t rows) {
  check_tensor(offsets, "offsets", ScalarType::Int, offsets.numel());
  STD_TORCH_CHECK(offsets.numel() > 0, "offsets must have a group");
  const int32_t* ends = offsets.const_data_ptr<int32_t>();
  const int64_t sequences = offsets.dim() == 2 ? offsets.size(1) : 1;
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t i = 0; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(begin <= ends[i], "offsets must ascend from 0");
    groups.push_back({i / sequences, i % sequences, begin, ends[i]});
    begin = ends[i];
  }
  STD_TORCH_CHECK(begin == rows, "offsets must end at ", rows, ", got ", begin);
  return groups;
}

// Calls body(group, begin, end) on the rows of every group. Each thread has an equal part of all
// rows, and a group that lies in two parts is cut.
template <class Body>
void for_each_piece(const std::vector<Group>& groups, int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, rows, kGrain, [&](int64_t first, int64_t last) {
    for (const Group& group : groups) {
      const int64_t begin = std::max(group.begin, first), end = std::min(group.end, last);
      if (begin < end) body(group, begin, end);
    }
  });
}

Matrix whole(const Tensor& matrix) {
  return {matrix, 0, matrix.size(0), matrix.size(1), matrix.stride(0), matrix.stride(1)};
}

// The group's matrix of fast weights [(S,) E, M, N].
Matrix of_group(const Tensor& weights, const Group& group) {
  const int64_t last = weights.dim() - 1, expert = last - 2;
  int64_t offset = group.expert * weights.stride(expert);
  if (expert == 1) offset += group.sequence * weights.stride(0);
  return {weights,
          offset,
          weights.size(last - 1),
          weights.size(last),
          weights.stride(last - 1),
          weights.stride(last)};
}

// P projections are stacked in the columns of out, in the rows of A and in the rows of B.
struct Projections {
  int64_t count, rank, width;

  Matrix ranks(const Matrix& shrink, int64_t p) const {
    return shrink.column_range(p * rank, (p + 1) * rank);
  }
  Matrix columns(const Matrix& out, int64_t p) const {
    return out.column_range(p * width, (p + 1) * width);
  }
  Matrix rows(const Matrix& B, int64_t p) const { return B.row_range(p * width, (p + 1) * width); }
};

// The library checks none of a Matrix's bounds: sizes are checked here.
Projections check_fast_weights(const Tensor& A, const Tensor& B, const Tensor& offsets,
                               const Tensor& like) {
  const int64_t dimensions = offsets.dim() + 2;
  check_gemm_operand(A, "A", like, dimensions);
  check_gemm_operand(B, "B", like, dimensions);
  STD_TORCH_CHECK(A.size(dimensions - 3) == offsets.size(0), "A must have a matrix per expert");
  STD_TORCH_CHECK(B.size(dimensions - 3) == offsets.size(0), "B must have a matrix per expert");
  STD_TORCH_CHECK(dimensions == 3 || (A.size(0) == offsets.size(1) && B.size(0) == offsets.size(1)),
                  "A and B must have one set per sequence");
  const int64_t rank = B.size(dimensions - 1), out = B.size(dimensions - 2);
  STD_TORCH_CHECK(rank > 0 && A.size(dimensions - 2) % rank == 0, "A must have P * R rows");
  const int64_t count = A.size(dimensions - 2) / rank;
  STD_TORCH_CHECK(count > 0 && out % count == 0, "P must divide out");
  return {count, rank, out / count};
}

void check_matrix(const Tensor& matrix, const char* name, const Tensor& like, int64_t rows,
                  int64_t columns) {
  check_gemm_operand(matrix, name, like, 2);
  STD_TORCH_CHECK(matrix.size(0) == rows && matrix.size(1) == columns, name, " must be [", rows,
                  ", ", columns, "]");
}

// x [N, in], base and out [N, out], A [(S,) E, P * R, in], B [(S,) E, out, R], offsets [E(, S)];
// shrink [N, P * R] becomes scale * x Aᵀ.
void grouped_lora_linear(const Tensor& x, const Tensor& base, const Tensor& A, const Tensor& B,
                         const Tensor& offsets, double scale, const Tensor& out,
                         const Tensor& shrink) {
  const int64_t rows = x.size(0);
  const Projections projections = check_fast_weights(A, B, offsets, x);
  check_matrix(x, "x", x, rows, A.size(A.dim() - 1));
  check_matrix(base, "base", x, rows, B.size(B.dim() - 2));
  check_matrix(out, "out", x, rows, B.size(B.dim() - 2));
  check_matrix(shrink, "shrink", x, rows, A.size(A.dim() - 2));
  for_each_piece(
      make_groups(offsets, rows), rows, [&](const Group& group, int64_t begin, int64_t end) {
        const Matrix part = whole(shrink).row_range(begin, end);
        write_product(part, scale, whole(x).row_range(begin, end), of_group(A, group).transposed());
        for (int64_t p = 0; p < projections.count; ++p)
          write_sum(projections.columns(whole(out).row_range(begin, end), p),
                    projections.columns(whole(base).row_range(begin, end), p),
                    projections.ranks(part, p),
                    projections.rows(of_group(B, group), p).transposed());
      });
}

void zero_empty_groups(const Tensor& grad, const std::vector<Group>& groups) {
  const size_t bytes = grad.numel() / groups.size() * grad.element_size();
  for (const Group& group : groups) {
    if (group.begin != group.end) continue;
    const int64_t offset = of_group(grad, group).offset * grad.element_size();
    std::memset(static_cast<char*>(grad.mutable_data_ptr()) + offset, 0, bytes);
  }
}

// A gradient is computed where its tensor is given; grad_shrink [N, P * R] is scratch.
void grouped_lora_linear_backward(const Tensor& grad_out, const std::optional<Tensor>& x,
                                  const std::optional<Tensor>& shrink, const Tensor& A,
                                  const Tensor& B, const Tensor& offsets, double scale,
                                  const Tensor& grad_shrink, const std::optional<Tensor>& grad_x,
                                  const std::optional<Tensor>& grad_A,
                                  const std::optional<Tensor>& grad_B) {
  const int64_t rows = grad_out.size(0);
  const Projections projections = check_fast_weights(A, B, offsets, grad_out);
  const int64_t columns = A.size(A.dim() - 1), ranks = A.size(A.dim() - 2);
  check_matrix(grad_out, "grad_out", grad_out, rows, B.size(B.dim() - 2));
  check_matrix(grad_shrink, "grad_shrink", grad_out, rows, ranks);
  if (x) check_matrix(*x, "x", grad_out, rows, columns);
  if (shrink) check_matrix(*shrink, "shrink", grad_out, rows, ranks);
  if (grad_x) check_matrix(*grad_x, "grad_x", grad_out, rows, columns);
  STD_TORCH_CHECK(!grad_A || x, "grad_A needs x");
  STD_TORCH_CHECK(!grad_B || shrink, "grad_B needs shrink");
  if (grad_A) check_tensor(*grad_A, "grad_A", grad_out.scalar_type(), A.numel());
  if (grad_B) check_tensor(*grad_B, "grad_B", grad_out.scalar_type(), B.numel());
  const std::vector<Group> groups = make_groups(offsets, rows);

  if (grad_x || grad_A) {
    for_each_piece(groups, rows, [&](const Group& group, int64_t begin, int64_t end) {
      const Matrix part = whole(grad_shrink).row_range(begin, end);
      for (int64_t p = 0; p < projections.count; ++p)
        write_product(projections.ranks(part, p), scale,
                      projections.columns(whole(grad_out).row_range(begin, end), p),
                      projections.rows(of_group(B, group), p));
      if (grad_x) write_product(whole(*grad_x).row_range(begin, end), 1, part, of_group(A, group));
    });
  }
  if (!grad_A && !grad_B) return;
  if (grad_A) zero_empty_groups(*grad_A, groups);
  if (grad_B) zero_empty_groups(*grad_B, groups);
  for_each_piece(groups, rows, [&](const Group& group, int64_t begin, int64_t end) {
    // A cut group's gradients sum over all its rows, so what a thread gets of them is not the
    // piece's rows but the same share of the gradients' columns: no partial sums.
    const auto share = [&](int64_t size) {
      const int64_t length = group.end - group.begin;
      return std::pair{size * (begin - group.begin) / length, size * (end - group.begin) / length};
    };
    const auto of_all_rows = [&](const Tensor& tensor) {
      return whole(tensor).row_range(group.begin, group.end);
    };
    if (grad_A) {
      const auto [first, last] = share(columns);
      write_product(of_group(*grad_A, group).column_range(first, last), 1,
                    of_all_rows(grad_shrink).transposed(),
                    of_all_rows(*x).column_range(first, last));
    }
    if (grad_B) {
      const auto [first, last] = share(projections.width);
      for (int64_t p = 0; p < projections.count; ++p)
        write_product(
            projections.rows(of_group(*grad_B, group), p).row_range(first, last), 1,
            projections.columns(of_all_rows(grad_out), p).column_range(first, last).transposed(),
            projections.ranks(of_all_rows(*shrink), p));
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CPU, m) {
  m.impl("grouped_lora_linear", TORCH_BOX(&grouped_lora_linear));
  m.impl("grouped_lora_linear_backward", TORCH_BOX(&grouped_lora_linear_backward));
}

}  // namespace
}  // namespace memdlm
