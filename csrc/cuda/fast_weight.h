// What the kernels of fast weights are given: raw pointers and a stream, nothing of torch's.
//
// All tensors are flat buffers [rows, columns] with adjacent columns and rows `stride` elements
// apart. Columns are counted in 64 bits: a row may hold more than 2^31 elements. Rows and segments
// are counted in 32, of which kernels need half the registers: at most kMaxCount of each.
#pragma once

#include <cstdint>

namespace memdlm {

constexpr int64_t kMaxCount = int64_t{1} << 30;

enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

template <class Pointer>
struct Flat {
  Pointer data = nullptr;  // null where the tensor is absent
  int64_t stride = 0;
  Dtype dtype = Dtype::kFloat32;
};

enum class Clip : int { kTensor, kGlobal, kNone };

struct FastWeightSgd {
  static constexpr int kSums = 1;  // of a segment: its squares
  Flat<void*> param;
  Flat<const void*> grad;
  Flat<void*> cast;                   // optional: param rounded to another dtype
  Flat<const void*> loss;             // optional: [rows]
  const int64_t* segments = nullptr;  // [count + 1]
  int64_t columns = 0;
  int rows = 0, count = 0;
  double lr = 0, max_norm = 0;
  Clip clip = Clip::kNone;
  void* norm = nullptr;       // [rows, count], float64 if grad is, else float32
  bool* skipped = nullptr;    // [rows]
  double* scratch = nullptr;  // [fast_weight_sgd_scratch()], uninitialised
};

struct FastWeightSgdBackward {
  static constexpr int kSums = 2;  // of a segment: its squares, its products with grad_updated
  Flat<const void*> grad_updated;
  Flat<const void*> grad;
  Flat<void*> grad_grad;              // of grad's dtype
  const int64_t* segments = nullptr;  // [count + 1]
  int64_t columns = 0;
  int rows = 0, count = 0;
  double lr = 0, max_norm = 0;
  Clip clip = Clip::kNone;
  const bool* skipped = nullptr;  // [rows]
  double* scratch = nullptr;      // [fast_weight_sgd_backward_scratch()], uninitialised
};

struct FastWeightReset {
  Flat<void*> param;
  Flat<void*> cast;                   // optional
  Flat<const void*> bounds;           // [count], float32 or float64
  const int64_t* segments = nullptr;  // [count + 1]
  const int64_t* seed = nullptr;      // [rows]
  int64_t columns = 0;
  int rows = 0, count = 0;
};

// Number of doubles that a step and its derivative need as scratch.
int64_t fast_weight_sgd_scratch(int rows, int64_t columns, int count);
int64_t fast_weight_sgd_backward_scratch(int rows, int64_t columns, int count);

// All launch on `stream` of the current device and return what CUDA says of it, null if all is
// well. None waits.
const char* launch_fast_weight_sgd(const FastWeightSgd& step, void* stream);
const char* launch_fast_weight_sgd_backward(const FastWeightSgdBackward& step, void* stream);
const char* launch_fast_weight_reset(const FastWeightReset& reset, void* stream);

}  // namespace memdlm
