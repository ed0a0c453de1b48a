// Fast weights of S sets (rows) in one flat buffer [S, T], cut into P tensors by a segment table:
// clipped SGD in two passes over the gradient, its derivative in two more, and a redraw in one pass
// of writes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/instruction_set.h"

namespace memdlm {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What T is computed in.
template <class T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Part of one segment of one row. Its length depends on the segment table alone, never on the
// number of threads, and so do all sums.
struct Block {
  int64_t row, segment, begin, end;
};

constexpr int64_t kBlock = 1 << 14;  // elements: a block of gradient fits the L1 or L2 cache
constexpr int64_t kGrain = 4;        // blocks: less is not worth waking a thread for

std::vector<Block> make_blocks(const Tensor& segments, int64_t rows, int64_t columns) {
  check_tensor(segments, "segments", ScalarType::Long, segments.numel());
  const int64_t* bounds = segments.const_data_ptr<int64_t>();
  const int64_t count = segments.numel() - 1;
  STD_TORCH_CHECK(count >= 0 && bounds[0] == 0 && bounds[count] == columns,
                  "segments must run from 0 to ", columns);
  std::vector<Block> blocks;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t segment = 0; segment < count; ++segment) {
      STD_TORCH_CHECK(bounds[segment] <= bounds[segment + 1], "segments must ascend");
      for (int64_t begin = bounds[segment]; begin < bounds[segment + 1]; begin += kBlock) {
        blocks.push_back({row, segment, begin, std::min(begin + kBlock, bounds[segment + 1])});
      }
    }
  }
  return blocks;
}

// Calls body(block) for all blocks, on all threads.
template <class Body>
void for_each_block(const std::vector<Block>& blocks, Body body) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) body(blocks[b]);
  });
}

// Row `row` of a tensor [S, T] whose columns are adjacent.
template <class T>
T* row_of(const Tensor& flat, int64_t row) {
  return static_cast<T*>(flat.mutable_data_ptr()) + row * flat.stride(0);
}

void check_flat(const Tensor& flat, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(flat.is_cpu() && flat.dim() == 2, name, " must be a CPU tensor [S, T]");
  STD_TORCH_CHECK(flat.size(0) == rows && flat.size(1) == columns, name, " must be [", rows, ", ",
                  columns, "]");
  STD_TORCH_CHECK(columns <= 1 || flat.stride(1) == 1, name, " must have adjacent columns");
}

// Calls body.operator()<T>() with the C++ type of a floating-point dtype.
template <class Body>
void with_type(ScalarType dtype, const char* name, Body body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16>();
    case ScalarType::Half:
      return body.template operator()<Half>();
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

typedef double Wide __attribute__((vector_size(64)));

// 32 adjacent elements in double, where no square of a float overflows or underflows and each is
// exact.
template <class T>
__attribute__((always_inline)) inline void widen(const T* x, Wide* wide) {
  typedef Work<T> Narrow __attribute__((vector_size(8 * sizeof(Work<T>))));
  Narrow narrow[4];
  Work<T> values[32];
  for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Work<T>>(x[lane]);
  std::memcpy(narrow, values, sizeof(narrow));
  for (int chain = 0; chain < 4; ++chain)
    wide[chain] = __builtin_convertvector(narrow[chain], Wide);
}

// The sum of four chains, which hide the latency of the addition, and of the rest.
__attribute__((always_inline)) inline double total_of(const Wide* chains, double rest) {
  const Wide sum = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  for (int lane = 0; lane < 8; ++lane) rest += sum[lane];
  return rest;
}

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  Wide chains[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Wide wide[4];
    widen(x + i, wide);
    for (int chain = 0; chain < 4; ++chain) chains[chain] += wide[chain] * wide[chain];
  }
  double rest = 0;
  for (; i < n; ++i) {
    const double value = static_cast<Work<T>>(x[i]);
    rest += value * value;
  }
  return total_of(chains, rest);
}

template <class T, class U>
double sum_of_products(const T* x, const U* y, int64_t n) {
  Wide chains[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    Wide x_wide[4], y_wide[4];
    widen(x + i, x_wide);
    widen(y + i, y_wide);
    for (int chain = 0; chain < 4; ++chain) chains[chain] += x_wide[chain] * y_wide[chain];
  }
  double rest = 0;
  for (; i < n; ++i) {
    rest += static_cast<double>(static_cast<Work<T>>(x[i])) * static_cast<Work<U>>(y[i]);
  }
  return total_of(chains, rest);
}

// Of one segment of one row, or of a whole row.
struct Sums {
  double square = 0;   // of the gradient with itself
  double product = 0;  // and with another tensor
};

// What sums_of(block) adds up to for each segment of each row, `size` in all.
template <class Body>
std::vector<Sums> sum_segments(const std::vector<Block>& blocks, int64_t size, int64_t count,
                               Body sums_of) {
  std::vector<Sums> partial(blocks.size()), sums(size);
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  torch::stable::parallel_for(0, block_count, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) partial[b] = sums_of(blocks[b]);
  });
  for (int64_t b = 0; b < block_count; ++b) {
    Sums& sum = sums[blocks[b].row * count + blocks[b].segment];
    sum.square += partial[b].square;
    sum.product += partial[b].product;
  }
  return sums;
}

// The sums that decide how each segment is clipped: its own, or for "global" those of its row.
std::vector<Sums> clip_sums(std::vector<Sums> sums, int64_t count, const std::string& clip) {
  if (clip != "global") return sums;
  for (auto row = sums.begin(); row != sums.end(); row += count) {
    Sums total;
    for (auto sum = row; sum != row + count; ++sum) {
      total.square += sum->square;
      total.product += sum->product;
    }
    std::fill(row, row + count, total);
  }
  return sums;
}

bool is_clipped(double square, double max_norm, const std::string& clip) {
  return clip != "none" && std::sqrt(square) > max_norm;
}

// cast[i] = param[i], by way of float where either has 16 bits, as torch does it.
template <class P, class C>
void copy_rounded(C* __restrict__ cast, const P* __restrict__ param, int64_t n) {
  for (int64_t i = 0; i < n; ++i) cast[i] = static_cast<C>(static_cast<Work<P>>(param[i]));
}

// The same for one block of two tensors [S, T], while the block of param is in the cache.
void refresh_cast(const std::optional<Tensor>& cast, const Tensor& param, const Block& block) {
  if (!cast) return;
  with_type(param.scalar_type(), "param", [&]<class P>() {
    with_type(cast->scalar_type(), "cast", [&]<class C>() {
      C* to = row_of<C>(*cast, block.row) + block.begin;
      const P* from = row_of<const P>(param, block.row) + block.begin;
      with_best_instructions([&] { copy_rounded(to, from, block.end - block.begin); });
    });
  });
}

// In double too, which costs no time beside the memory's: clipping a huge gradient takes a factor
// too small for a float.
template <class P, class G>
void descend(P* __restrict__ param, const G* __restrict__ grad, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double update = factor * static_cast<Work<G>>(grad[i]);
    param[i] = static_cast<P>(static_cast<Work<P>>(static_cast<Work<P>>(param[i]) - update));
  }
}

// Whether each row's loss is not finite.
void mark_bad_losses(const std::optional<Tensor>& loss, bool* skip, int64_t rows) {
  std::fill(skip, skip + rows, false);
  if (!loss) return;
  STD_TORCH_CHECK(loss->is_cpu() && loss->dim() == 1 && loss->size(0) == rows,
                  "loss must be a CPU tensor [S]");
  with_type(loss->scalar_type(), "loss", [&]<class L>() {
    const L* values = static_cast<const L*>(loss->const_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      skip[row] = !std::isfinite(static_cast<Work<L>>(values[row * loss->stride(0)]));
    }
  });
}

void fast_weight_sgd_(const Tensor& param, const Tensor& grad, const Tensor& segments, double lr,
                      double max_norm, std::string clip, const std::optional<Tensor>& loss,
                      const Tensor& norm, const Tensor& skipped,
                      const std::optional<Tensor>& cast) {
  const int64_t rows = param.size(0), columns = param.size(1), count = segments.numel() - 1;
  check_flat(param, "param", rows, columns);
  check_flat(grad, "grad", rows, columns);
  check_tensor(norm, "norm", norm.scalar_type(), rows * count);
  check_tensor(skipped, "skipped", ScalarType::Bool, rows);
  if (cast) check_flat(*cast, "cast", rows, columns);
  const std::vector<Block> blocks = make_blocks(segments, rows, columns);

  std::vector<Sums> sums;
  with_type(grad.scalar_type(), "grad", [&]<class G>() {
    sums = sum_segments(blocks, rows * count, count, [&](const Block& block) {
      const G* x = row_of<const G>(grad, block.row) + block.begin;
      const int64_t n = block.end - block.begin;
      return Sums{with_best_instructions([&] { return sum_of_squares(x, n); }), 0};
    });
  });

  bool* skip = skipped.mutable_data_ptr<bool>();
  mark_bad_losses(loss, skip, rows);
  for (int64_t i = 0; i < rows * count; ++i) {
    const double segment_norm = std::sqrt(sums[i].square);
    bool finite;
    if (norm.scalar_type() == ScalarType::Double) {
      norm.mutable_data_ptr<double>()[i] = segment_norm;
      finite = std::isfinite(segment_norm);
    } else {
      norm.mutable_data_ptr<float>()[i] = static_cast<float>(segment_norm);
      finite = std::isfinite(static_cast<float>(segment_norm));
    }
    skip[i / count] |= !finite;
  }
  sums = clip_sums(std::move(sums), count, clip);
  std::vector<double> factor(rows * count, lr);
  for (int64_t i = 0; i < rows * count; ++i) {
    const double square = sums[i].square;
    if (is_clipped(square, max_norm, clip)) factor[i] = lr * (max_norm / std::sqrt(square));
  }

  with_type(param.scalar_type(), "param", [&]<class P>() {
    with_type(grad.scalar_type(), "grad", [&]<class G>() {
      for_each_block(blocks, [&](const Block& block) {
        if (skip[block.row]) return;
        P* p = row_of<P>(param, block.row) + block.begin;
        const G* g = row_of<const G>(grad, block.row) + block.begin;
        const double step = factor[block.row * count + block.segment];
        with_best_instructions([&] { descend(p, g, step, block.end - block.begin); });
        refresh_cast(cast, param, block);
      });
    });
  });
}

// grad_grad[i] = -factor * (grad_updated[i] - along * grad[i])
template <class U, class G>
void project(G* __restrict__ grad_grad, const U* __restrict__ grad_updated,
             const G* __restrict__ grad, double factor, double along, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double radial = along * static_cast<Work<G>>(grad[i]);
    const double slope = static_cast<Work<U>>(grad_updated[i]) - radial;
    grad_grad[i] = static_cast<G>(static_cast<Work<G>>(-factor * slope));
  }
}

// A clipped gradient g gives lr * max_norm * g / |g|, which no change of g along g itself moves.
void fast_weight_sgd_backward(const Tensor& grad_updated, const Tensor& grad,
                              const Tensor& segments, double lr, double max_norm, std::string clip,
                              const Tensor& skipped, const Tensor& grad_grad) {
  const int64_t rows = grad.size(0), columns = grad.size(1), count = segments.numel() - 1;
  check_flat(grad_updated, "grad_updated", rows, columns);
  check_flat(grad, "grad", rows, columns);
  check_tensor(skipped, "skipped", ScalarType::Bool, rows);
  check_tensor(grad_grad, "grad_grad", grad.scalar_type(), rows * columns);
  const bool* skip = skipped.const_data_ptr<bool>();
  const std::vector<Block> blocks = make_blocks(segments, rows, columns);

  with_type(grad_updated.scalar_type(), "grad_updated", [&]<class U>() {
    with_type(grad.scalar_type(), "grad", [&]<class G>() {
      std::vector<double> factor(rows * count, lr), along(rows * count);
      if (clip != "none") {
        // A block of both is in the cache when it is read again.
        std::vector<Sums> sums = sum_segments(blocks, rows * count, count, [&](const Block& block) {
          const U* u = row_of<const U>(grad_updated, block.row) + block.begin;
          const G* g = row_of<const G>(grad, block.row) + block.begin;
          const int64_t n = block.end - block.begin;
          return with_best_instructions(
              [&] { return Sums{sum_of_squares(g, n), sum_of_products(g, u, n)}; });
        });
        sums = clip_sums(std::move(sums), count, clip);
        for (int64_t i = 0; i < rows * count; ++i) {
          if (!is_clipped(sums[i].square, max_norm, clip)) continue;
          factor[i] = lr * (max_norm / std::sqrt(sums[i].square));
          along[i] = sums[i].product / sums[i].square;
        }
      }
      for_each_block(blocks, [&](const Block& block) {
        G* out = row_of<G>(grad_grad, block.row) + block.begin;
        const int64_t i = block.row * count + block.segment, n = block.end - block.begin;
        if (skip[block.row]) {
          std::fill(out, out + n, static_cast<G>(0.0f));
        } else {
          const U* u = row_of<const U>(grad_updated, block.row) + block.begin;
          const G* g = row_of<const G>(grad, block.row) + block.begin;
          with_best_instructions([&] { project(out, u, g, factor[i], along[i], n); });
        }
      });
    });
  });
}

// Philox4x32-10 of `kCounters` adjacent counters, each giving four adjacent outputs in [-1, 1).
constexpr int64_t kCounters = 16;

template <class W>
__attribute__((always_inline)) inline void philox(uint32_t counter, uint64_t seed, W* out) {
  // Words of 32 bits in lanes of 64, so that a product needs no widening.
  typedef uint64_t Lanes __attribute__((vector_size(8 * kCounters)));
  const Lanes word = Lanes{} + 0xffffffffu;
  Lanes c0, c1 = {}, c2 = {}, c3 = {};
  for (int64_t lane = 0; lane < kCounters; ++lane) {
    c0[lane] = static_cast<uint32_t>(counter + static_cast<uint32_t>(lane));
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes product0 = c0 * (Lanes{} + 0xD2511F53u);
    const Lanes product1 = c2 * (Lanes{} + 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c1 = product1 & word;
    c3 = product0 & word;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t lane = 0; lane < kCounters; ++lane) {
    const uint64_t words[4] = {c0[lane], c1[lane], c2[lane], c3[lane]};
    for (int i = 0; i < 4; ++i) {
      // (word >> 8) / 2**24 * 2 - 1, exact in float32.
      const int32_t centred = static_cast<int32_t>(words[i] >> 8) - (1 << 23);
      out[4 * lane + i] = static_cast<W>(centred) * static_cast<W>(0x1p-23);
    }
  }
}

template <class T>
void draw(T* row, uint64_t seed, double bound, int64_t begin, int64_t end) {
  constexpr int64_t kWords = 4 * kCounters;
  const Work<T> scale = static_cast<Work<T>>(bound);
  // A segment may begin and end within a counter's four words.
  for (int64_t start = begin / kWords * kWords; start < end; start += kWords) {
    Work<T> values[kWords];
    philox(static_cast<uint32_t>(start / 4), seed, values);
    if (start >= begin && start + kWords <= end) {
      for (int64_t i = 0; i < kWords; ++i) row[start + i] = static_cast<T>(values[i] * scale);
    } else {
      for (int64_t j = std::max(start, begin); j < std::min(start + kWords, end); ++j) {
        row[j] = static_cast<T>(values[j - start] * scale);
      }
    }
  }
}

void fast_weight_reset_(const Tensor& param, const Tensor& segments, const Tensor& bounds,
                        const Tensor& seed, const std::optional<Tensor>& cast) {
  const int64_t rows = param.size(0), columns = param.size(1);
  check_flat(param, "param", rows, columns);
  check_tensor(bounds, "bounds", bounds.scalar_type(), segments.numel() - 1);
  check_tensor(seed, "seed", ScalarType::Long, rows);
  if (cast) check_flat(*cast, "cast", rows, columns);
  std::vector<double> bound;
  with_type(bounds.scalar_type(), "bounds", [&]<class T>() {
    const T* values = static_cast<const T*>(bounds.const_data_ptr());
    bound.assign(values, values + bounds.numel());
  });
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const std::vector<Block> blocks = make_blocks(segments, rows, columns);

  with_type(param.scalar_type(), "param", [&]<class T>() {
    for_each_block(blocks, [&](const Block& block) {
      T* row = row_of<T>(param, block.row);
      if (static_cast<Work<T>>(bound[block.segment]) == 0) {
        // Half of all fast weights: every B. Nothing to draw.
        std::fill(row + block.begin, row + block.end, static_cast<T>(0.0f));
      } else {
        const uint64_t seed_of_row = static_cast<uint64_t>(seeds[block.row]);
        with_best_instructions(
            [&] { draw(row, seed_of_row, bound[block.segment], block.begin, block.end); });
      }
      refresh_cast(cast, param, block);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CPU, m) {
  m.impl("fast_weight_sgd_", TORCH_BOX(&fast_weight_sgd_));
  m.impl("fast_weight_sgd_backward", TORCH_BOX(&fast_weight_sgd_backward));
  m.impl("fast_weight_reset_", TORCH_BOX(&fast_weight_reset_));
}

}  // namespace
}  // namespace memdlm
