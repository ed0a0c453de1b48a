// Schemas of the private ops. Each op's kernel file registers its implementation
// (STABLE_TORCH_LIBRARY_IMPL). Public names, fakes and autograd live in Python: these ops are
// called with arguments already validated and outputs already allocated.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(memdlm_C, m) {
  m.def(
      "fast_weight_sgd_(Tensor(a!) param, Tensor grad, Tensor segments, float lr, float max_norm, "
      "str clip, Tensor? loss, Tensor(b!) norm, Tensor(c!) skipped, Tensor(d!)? cast) -> ()");
  m.def(
      "fast_weight_sgd_backward(Tensor grad_updated, Tensor grad, Tensor segments, float lr, "
      "float max_norm, str clip, Tensor skipped, Tensor(a!) grad_grad) -> ()");
  m.def(
      "fast_weight_reset_(Tensor(a!) param, Tensor segments, Tensor bounds, Tensor seed, "
      "Tensor(b!)? cast) -> ()");
  m.def(
      "grouped_lora_linear(Tensor x, Tensor base, Tensor A, Tensor B, Tensor offsets, float scale, "
      "Tensor(a!) out, Tensor(b!) shrink) -> ()");
  m.def(
      "grouped_lora_linear_backward(Tensor grad_out, Tensor? x, Tensor? shrink, Tensor A, "
      "Tensor B, Tensor offsets, float scale, Tensor(a!) grad_shrink, Tensor(b!)? grad_x, "
      "Tensor(c!)? grad_A, Tensor(d!)? grad_B) -> ()");
  m.def(
      "lora_linear(Tensor x, Tensor base, Tensor A, Tensor B, float scale, Tensor(a!) out, "
      "Tensor(b!) shrink) -> ()");
  m.def(
      "lora_linear_backward(Tensor grad_out, Tensor? x, Tensor? shrink, Tensor A, Tensor B, "
      "float scale, Tensor(a!) grad_shrink, Tensor(b!)? grad_x, Tensor(c!)? grad_A, "
      "Tensor(d!)? grad_B) -> ()");
  m.def(
      "masked_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? index, int ignore_index, float? softcap, int? chunk_bytes, Tensor(a!) nll, "
      "Tensor(b!) lse, Tensor(c!)? stash) -> ()");
  m.def(
      "masked_linear_cross_entropy_backward(Tensor grad_nll, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? bias, Tensor? index, Tensor nll, Tensor lse, int ignore_index, "
      "float? softcap, int? chunk_bytes, Tensor(a!)? grad_rows, Tensor(b!)? grad_weight, "
      "Tensor(c!)? grad_bias) -> ()");
  m.def("scatter_rows(Tensor? scale, Tensor rows, Tensor? index, Tensor(a!) out) -> ()");
  m.def(
      "masked_cross_entropy(Tensor logits, Tensor target, int ignore_index, float? softcap, "
      "Tensor(a!) nll, Tensor(b!) lse) -> ()");
  m.def(
      "masked_cross_entropy_backward(Tensor grad_nll, Tensor logits, Tensor target, Tensor nll, "
      "Tensor lse, int ignore_index, float? softcap, Tensor(a!) grad_logits) -> ()");
}
