// The ops of fast weights on a GPU, for torch: checks, the current stream, the scratch buffer.
#include "fast_weight.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "check.h"

// A torch without CUDA does not have it, and must load this library all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace memdlm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// What the kernels need of a tensor [S, T] with adjacent columns.
Flat<void*> flat_of(const Tensor& flat, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(flat.is_cuda() && flat.dim() == 2 && flat.size(0) == rows &&
                      flat.size(1) == columns && (columns <= 1 || flat.stride(1) == 1),
                  name, " must be [", rows, ", ", columns, "] on a GPU with adjacent columns");
  return {flat.mutable_data_ptr(), flat.stride(0), dtype_of(flat, name)};
}

Flat<const void*> read_only(const Flat<void*>& flat) {
  return {flat.data, flat.stride, flat.dtype};
}

int checked_count(int64_t count, const char* name) {
  STD_TORCH_CHECK(count >= 0 && count <= kMaxCount, "at most ", kMaxCount, " ", name, ", got ",
                  count);
  return static_cast<int>(count);
}

const int64_t* segments_of(const Tensor& segments) {
  check_cuda_tensor(segments, "segments", ScalarType::Long, segments.numel());
  return segments.const_data_ptr<int64_t>();
}

Clip clip_of(const std::string& clip) {
  return clip == "tensor" ? Clip::kTensor : clip == "global" ? Clip::kGlobal : Clip::kNone;
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void fast_weight_sgd_(const Tensor& param, const Tensor& grad, const Tensor& segments, double lr,
                      double max_norm, std::string clip, const std::optional<Tensor>& loss,
                      const Tensor& norm, const Tensor& skipped,
                      const std::optional<Tensor>& cast) {
  const int64_t rows = param.size(0), columns = param.size(1);
  FastWeightSgd step;
  step.rows = checked_count(rows, "rows");
  step.columns = columns;
  step.count = checked_count(segments.numel() - 1, "segments");
  step.param = flat_of(param, "param", rows, columns);
  step.grad = read_only(flat_of(grad, "grad", rows, columns));
  if (cast) step.cast = flat_of(*cast, "cast", rows, columns);
  if (loss) {
    STD_TORCH_CHECK(loss->is_cuda() && loss->dim() == 1 && loss->size(0) == rows, "loss must be [",
                    rows, "] on a GPU");
    step.loss = {loss->const_data_ptr(), loss->stride(0), dtype_of(*loss, "loss")};
  }
  step.segments = segments_of(segments);
  step.lr = lr;
  step.max_norm = max_norm;
  step.clip = clip_of(clip);
  const bool wide = step.grad.dtype == Dtype::kFloat64;
  check_cuda_tensor(norm, "norm", wide ? ScalarType::Double : ScalarType::Float, rows * step.count);
  check_cuda_tensor(skipped, "skipped", ScalarType::Bool, rows);
  step.norm = norm.mutable_data_ptr();
  step.skipped = skipped.mutable_data_ptr<bool>();

  const torch::stable::accelerator::DeviceGuard guard(param.get_device_index());
  const Tensor scratch = torch::stable::new_empty(
      param, {fast_weight_sgd_scratch(step.rows, columns, step.count)}, ScalarType::Double);
  step.scratch = scratch.mutable_data_ptr<double>();
  const char* error = launch_fast_weight_sgd(step, current_stream(param));
  STD_TORCH_CHECK(error == nullptr, "fast_weight_sgd_: ", error);
}

void fast_weight_sgd_backward(const Tensor& grad_updated, const Tensor& grad,
                              const Tensor& segments, double lr, double max_norm, std::string clip,
                              const Tensor& skipped, const Tensor& grad_grad) {
  const int64_t rows = grad.size(0), columns = grad.size(1);
  FastWeightSgdBackward step;
  step.rows = checked_count(rows, "rows");
  step.columns = columns;
  step.count = checked_count(segments.numel() - 1, "segments");
  step.grad_updated = read_only(flat_of(grad_updated, "grad_updated", rows, columns));
  step.grad = read_only(flat_of(grad, "grad", rows, columns));
  step.grad_grad = flat_of(grad_grad, "grad_grad", rows, columns);
  STD_TORCH_CHECK(step.grad_grad.dtype == step.grad.dtype, "grad_grad must have grad's dtype");
  step.segments = segments_of(segments);
  step.lr = lr;
  step.max_norm = max_norm;
  step.clip = clip_of(clip);
  check_cuda_tensor(skipped, "skipped", ScalarType::Bool, rows);
  step.skipped = skipped.const_data_ptr<bool>();

  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor scratch = torch::stable::new_empty(
      grad, {fast_weight_sgd_backward_scratch(step.rows, columns, step.count)}, ScalarType::Double);
  step.scratch = scratch.mutable_data_ptr<double>();
  const char* error = launch_fast_weight_sgd_backward(step, current_stream(grad));
  STD_TORCH_CHECK(error == nullptr, "fast_weight_sgd_backward: ", error);
}

void fast_weight_reset_(const Tensor& param, const Tensor& segments, const Tensor& bounds,
                        const Tensor& seed, const std::optional<Tensor>& cast) {
  const int64_t rows = param.size(0), columns = param.size(1);
  FastWeightReset reset;
  reset.rows = checked_count(rows, "rows");
  reset.columns = columns;
  reset.count = checked_count(segments.numel() - 1, "segments");
  reset.param = flat_of(param, "param", rows, columns);
  if (cast) reset.cast = flat_of(*cast, "cast", rows, columns);
  check_cuda_tensor(bounds, "bounds", bounds.scalar_type(), reset.count);
  reset.bounds = {bounds.const_data_ptr(), 1, dtype_of(bounds, "bounds")};
  check_cuda_tensor(seed, "seed", ScalarType::Long, rows);
  reset.segments = segments_of(segments);
  reset.seed = seed.const_data_ptr<int64_t>();

  const torch::stable::accelerator::DeviceGuard guard(param.get_device_index());
  const char* error = launch_fast_weight_reset(reset, current_stream(param));
  STD_TORCH_CHECK(error == nullptr, "fast_weight_reset_: ", error);
}

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CUDA, m) {
  m.impl("fast_weight_sgd_", TORCH_BOX(&fast_weight_sgd_));
  m.impl("fast_weight_sgd_backward", TORCH_BOX(&fast_weight_sgd_backward));
  m.impl("fast_weight_reset_", TORCH_BOX(&fast_weight_reset_));
}

}  // namespace
}  // namespace memdlm
