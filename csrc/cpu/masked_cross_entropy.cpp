// Cross-entropy of the rows of logits whose target is not ignored. A row is read twice in forward
// (maximum, then sum of exp: the second time from the cache) and once in backward.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>

#include "check.h"
#include "cpu/instruction_set.h"
#include "cpu/nll.h"
#include "cpu/vector.h"

namespace memdlm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 1024;  // words whose exp are added up in Scalar, before float64

template <class Scalar, int kBytes>
struct Width {
  typedef typename VectorOf<Scalar, kBytes>::type Vector;
  static constexpr int kLanes = kBytes / sizeof(Scalar);
};

// `count` logits from `from`, with -inf in the lanes beyond, and the softcap.
template <class Scalar, int kBytes, class T>
MEMDLM_INLINE void load_logits(const T* from, int64_t count, Scalar softcap,
                               typename Width<Scalar, kBytes>::Vector& logits) {
  using Vector = typename Width<Scalar, kBytes>::Vector;
  constexpr int kLanes = Width<Scalar, kBytes>::kLanes;
  Scalar lanes[kLanes];
  if (count >= kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<Scalar>(from[lane]);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] =
          lane < count ? static_cast<Scalar>(from[lane]) : -std::numeric_limits<Scalar>::infinity();
  }
  logits = load<Vector>(lanes);
  if (softcap > 0) {
    const Vector capped = softcap * hyperbolic_tangent<kBytes>(logits / softcap);
    // The lanes beyond stay -inf: capped, they would count as words.
    logits = logits == -std::numeric_limits<Scalar>::infinity() ? logits : capped;
  }
}

template <class Scalar, int kBytes, class T>
MEMDLM_INLINE Scalar highest_logit(const T* logits, int64_t count, Scalar softcap) {
  using Vector = typename Width<Scalar, kBytes>::Vector;
  constexpr int kLanes = Width<Scalar, kBytes>::kLanes;
  Vector highest = Vector{} + std::numeric_limits<Scalar>::lowest(), value;
  for (int64_t i = 0; i < count; i += kLanes) {
    load_logits<Scalar, kBytes>(logits + i, count - i, softcap, value);
    highest = larger(value, highest);
  }
  Scalar result = highest[0];
  for (int lane = 1; lane < kLanes; ++lane) result = std::max(result, highest[lane]);
  return result;
}

template <class Scalar, int kBytes, class T>
MEMDLM_INLINE double sum_of_exponentials(const T* logits, int64_t count, Scalar softcap,
                                         Scalar maximum) {
  using Vector = typename Width<Scalar, kBytes>::Vector;
  constexpr int kLanes = Width<Scalar, kBytes>::kLanes;
  double total = 0;
  for (int64_t block = 0; block < count; block += kBlock) {
    Vector sum{}, value;
    for (int64_t i = block; i < std::min(block + kBlock, count); i += kLanes) {
      load_logits<Scalar, kBytes>(logits + i, count - i, softcap, value);
      sum += exponential<kBytes>(value - maximum);
    }
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  }
  return total;
}

template <class Scalar, int kBytes, class T>
MEMDLM_INLINE void forward_row(const T* logits, int64_t words, int64_t target, Scalar softcap,
                               Scalar* nll, Scalar* lse) {
  using Vector = typename Width<Scalar, kBytes>::Vector;
  // The words before the target and those after it.
  const T* after = logits + target + 1;
  const int64_t count_after = words - target - 1;
  const Scalar maximum = std::max(highest_logit<Scalar, kBytes>(logits, target, softcap),
                                  highest_logit<Scalar, kBytes>(after, count_after, softcap));
  const double others = sum_of_exponentials<Scalar, kBytes>(logits, target, softcap, maximum) +
                        sum_of_exponentials<Scalar, kBytes>(after, count_after, softcap, maximum);
  Vector target_logit;
  load_logits<Scalar, kBytes>(logits + target, 1, softcap, target_logit);
  const double loss = nll_of(maximum, others, target_logit[0]);
  *nll = static_cast<Scalar>(loss);
  *lse = static_cast<Scalar>(target_logit[0] + loss);
}

template <class Scalar, int kBytes, class T>
MEMDLM_INLINE void backward_row(const T* logits, int64_t words, int64_t target, Scalar softcap,
                                Scalar grad, Scalar nll, Scalar lse, T* grad_logits) {
  using Vector = typename Width<Scalar, kBytes>::Vector;
  constexpr int kLanes = Width<Scalar, kBytes>::kLanes;
  Vector value;
  for (int64_t i = 0; i < words; i += kLanes) {
    load_logits<Scalar, kBytes>(logits + i, words - i, softcap, value);
    const Vector tangent = value / softcap;
    value = exponential<kBytes>(value - lse);
    // Where p is 0 the logit may be -inf: not a product.
    if (softcap > 0) value = value == 0 ? value : value * (1 - tangent * tangent);
    value *= grad;
    if (words - i >= kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) grad_logits[i + lane] = T(value[lane]);
    } else {
      for (int lane = 0; lane < words - i; ++lane) grad_logits[i + lane] = T(value[lane]);
    }
  }
  load_logits<Scalar, kBytes>(logits + target, 1, softcap, value);
  const Scalar tangent = softcap > 0 ? value[0] / softcap : 0;
  grad_logits[target] = T(grad * std::expm1(-nll) * (1 - tangent * tangent));
}

#define MEMDLM_COMPILE_FOR(Name, kBytes, target_instructions)                                     \
  template <class T, class Scalar>                                                                \
  struct Name {                                                                                   \
    target_instructions static void forward(const T* logits, int64_t words, int64_t target,       \
                                            Scalar softcap, Scalar* nll, Scalar* lse) {           \
      forward_row<Scalar, kBytes>(logits, words, target, softcap, nll, lse);                      \
    }                                                                                             \
    target_instructions static void backward(const T* logits, int64_t words, int64_t target,      \
                                             Scalar softcap, Scalar grad, Scalar nll, Scalar lse, \
                                             T* grad_logits) {                                    \
      backward_row<Scalar, kBytes>(logits, words, target, softcap, grad, nll, lse, grad_logits);  \
    }                                                                                             \
  }

MEMDLM_COMPILE_FOR(ForBaseline, 32, );
MEMDLM_COMPILE_FOR(ForAvx2, 32, MEMDLM_AVX2);
MEMDLM_COMPILE_FOR(ForAvx512, 64, MEMDLM_AVX512);

// Calls `body` with the best of the above.
template <class T, class Scalar, class Body>
void with_instructions(const Body& body) {
  const InstructionSet best = instruction_set();
  if (best >= InstructionSet::kAvx512) return body(ForAvx512<T, Scalar>{});
  if (best == InstructionSet::kAvx2) return body(ForAvx2<T, Scalar>{});
  body(ForBaseline<T, Scalar>{});
}

template <class Body>
void with_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{}, float{});
    case ScalarType::BFloat16:
      return body(BFloat16{}, float{});
    case ScalarType::Half:
      return body(Half{}, float{});
    case ScalarType::Double:
      return body(double{}, double{});
    default:
      STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

// Shared by both directions: checks, and a loop over the rows.
struct Rows {
  const int64_t* target;
  int64_t count, words, ignore_index;

  Rows(const Tensor& logits, const Tensor& targets, int64_t ignore_index_)
      : target(static_cast<const int64_t*>(targets.const_data_ptr())),
        count(targets.numel()),
        words(logits.size(logits.dim() - 1)),
        ignore_index(ignore_index_) {
    check_tensor(logits, "logits", logits.scalar_type(), count * words);
    check_tensor(targets, "target", ScalarType::Long, count);
    for (int64_t row = 0; row < count; ++row)
      STD_TORCH_CHECK(target[row] == ignore_index || (0 <= target[row] && target[row] < words),
                      "target out of range");
  }
};

ScalarType scalar_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void masked_cross_entropy(Tensor logits, Tensor target, int64_t ignore_index,
                          std::optional<double> softcap, Tensor nll, Tensor lse) {
  const Rows rows(logits, target, ignore_index);
  check_tensor(nll, "nll", scalar_of(logits), rows.count);
  check_tensor(lse, "lse", scalar_of(logits), rows.count);
  with_dtype(logits.scalar_type(), [&]<class T, class Scalar>(T, Scalar) {
    const auto* data = static_cast<const T*>(logits.const_data_ptr());
    auto* nll_data = static_cast<Scalar*>(nll.mutable_data_ptr());
    auto* lse_data = static_cast<Scalar*>(lse.mutable_data_ptr());
    with_instructions<T, Scalar>([&](auto best) {
      torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          nll_data[row] = lse_data[row] = 0;
          if (rows.target[row] == rows.ignore_index) continue;
          best.forward(data + row * rows.words, rows.words, rows.target[row],
                       static_cast<Scalar>(softcap.value_or(0)), nll_data + row, lse_data + row);
        }
      });
    });
  });
}

void masked_cross_entropy_backward(Tensor grad_nll, Tensor logits, Tensor target, Tensor nll,
                                   Tensor lse, int64_t ignore_index, std::optional<double> softcap,
                                   Tensor grad_logits) {
  const Rows rows(logits, target, ignore_index);
  check_tensor(grad_nll, "grad_nll", scalar_of(logits), rows.count);
  check_tensor(nll, "nll", scalar_of(logits), rows.count);
  check_tensor(lse, "lse", scalar_of(logits), rows.count);
  check_tensor(grad_logits, "grad_logits", logits.scalar_type(), logits.numel());
  with_dtype(logits.scalar_type(), [&]<class T, class Scalar>(T, Scalar) {
    const auto* data = static_cast<const T*>(logits.const_data_ptr());
    const auto* grad = static_cast<const Scalar*>(grad_nll.const_data_ptr());
    const auto* nll_data = static_cast<const Scalar*>(nll.const_data_ptr());
    const auto* lse_data = static_cast<const Scalar*>(lse.const_data_ptr());
    auto* grad_data = static_cast<T*>(grad_logits.mutable_data_ptr());
    with_instructions<T, Scalar>([&](auto best) {
      torch::stable::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          T* out = grad_data + row * rows.words;
          if (rows.target[row] == rows.ignore_index) {
            std::fill_n(out, rows.words, T(0));
            continue;
          }
          best.backward(data + row * rows.words, rows.words, rows.target[row],
                        static_cast<Scalar>(softcap.value_or(0)), grad[row], nll_data[row],
                        lse_data[row], out);
        }
      });
    });
  });
}

}  // namespace
}  // namespace memdlm

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CPU, m) {
  m.impl("masked_cross_entropy", TORCH_BOX(&memdlm::masked_cross_entropy));
  m.impl("masked_cross_entropy_backward", TORCH_BOX(&memdlm::masked_cross_entropy_backward));
}
