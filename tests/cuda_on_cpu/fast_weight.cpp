// The kernels of fast weights as a library for ctypes, whose structures are those of the header.
#include "../../csrc/cuda/fast_weight_reset.cu"
#include "../../csrc/cuda/fast_weight_sgd.cu"
#include "../../csrc/cuda/fast_weight_sgd_backward.cu"

extern "C" {

int64_t scratch(int rows, int64_t columns, int count) {
  return memdlm::fast_weight_sgd_scratch(rows, columns, count);
}
int64_t backward_scratch(int rows, int64_t columns, int count) {
  return memdlm::fast_weight_sgd_backward_scratch(rows, columns, count);
}
const char* sgd(const memdlm::FastWeightSgd* step) {
  return memdlm::launch_fast_weight_sgd(*step, nullptr);
}
const char* sgd_backward(const memdlm::FastWeightSgdBackward* step) {
  return memdlm::launch_fast_weight_sgd_backward(*step, nullptr);
}
const char* reset(const memdlm::FastWeightReset* reset) {
  return memdlm::launch_fast_weight_reset(*reset, nullptr);
}
int launches() { return cuda_on_cpu::launches; }
void run_blocks(uint64_t first, uint64_t last) {
  cuda_on_cpu::first_block = first;
  cuda_on_cpu::last_block = last;
}
}
