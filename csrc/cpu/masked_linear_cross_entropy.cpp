// Cross-entropy of a language-model head without its logits, in one pass over the vocabulary.
//
// Rows of hidden lie along the vector lanes: a panel is up to kColumns vectors of rows. A chunk of
// the weight is packed once and meets every panel: logits = W h, softmax down the lanes with an
// online maximum, then sum of p W. The weight's elements are broadcast, so that one packed copy
// serves both products; hidden is packed once, and no reduction crosses lanes.
//
// It is a small GEMM of its own because no library offers, on the CPU, bfloat16 inputs with float32
// results, which the gradient of a confident token needs, nor a softmax between two products.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

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

constexpr int64_t kGroup = 8;           // packed operands come in groups of 8 rows by 8 steps
constexpr int64_t kChunkMultiple = 16;  // words of the vocabulary: a group of 8 pairs
constexpr int64_t kPackedChunkBytes = 256 << 10;  // of weight: leaves most of a core's cache
constexpr int64_t kSmallestChunk = 64;
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kMostPartialBytes = 256 << 20;  // of grad_hidden, one copy for each part
constexpr int64_t kStepsPerPass = 128;            // summed on their own: short sums round less

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// --- What differs between instruction sets -------------------------------------------------------
// Element is what a product broadcasts: a number, or a pair of bfloat16 that are multiplied and
// added to a float32 at once. kRows * kColumns accumulators fill the registers.

template <class Scalar_, int kBytes_, int kRows_, int kColumns_>
struct Fused {
  using Scalar = Scalar_;
  using Element = Scalar_;
  static constexpr int kBytes = kBytes_, kRows = kRows_, kColumns = kColumns_;
  static constexpr int kLanes = kBytes / sizeof(Scalar);
  static constexpr int kPair = 1;
  typedef typename VectorOf<Scalar, kBytes>::type Vector;

  static MEMDLM_INLINE void multiply_add(Vector& sum, Element a, const Vector& b) { sum += a * b; }
};

struct PairsOfBFloat16 {
  using Scalar = float;
  using Element = uint32_t;  // the lower half is the earlier element
  static constexpr int kBytes = 64, kRows = 8, kColumns = 3;
  static constexpr int kLanes = 16;
  static constexpr int kPair = 2;
  typedef VectorOf<float, 64>::type Vector;

  static MEMDLM_INLINE void multiply_add(Vector& sum, Element a, const Vector& b) {
#if defined(__x86_64__)
    const VectorOf<uint32_t, 64>::type pair = VectorOf<uint32_t, 64>::type{} + a;
    // Not the intrinsic: it cannot be inlined through a template without the target attribute.
    Vector result = sum;  // an operand of its own: through a reference the sums leave the registers
    asm("vdpbf16ps %2, %1, %0" : "+v"(result) : "v"(b), "v"(pair));
    sum = result;
#endif
  }
};

using Baseline = Fused<float, 32, 4, 1>;
using Avx2 = Fused<float, 32, 4, 3>;
using Avx512 = Fused<float, 64, 8, 3>;
using Float64 = Fused<double, 64, 4, 1>;

template <class Isa>
inline constexpr bool kPairs = Isa::kPair == 2;

// --- Memory --------------------------------------------------------------------------------------

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

// Not initialised, aligned to a cache line.
template <class T>
Buffer<T> allocate(int64_t count) {
  void* pointer = std::aligned_alloc(64, round_up(std::max<int64_t>(count * sizeof(T), 1), 64));
  if (!pointer) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(pointer));
}

// --- The problem ---------------------------------------------------------------------------------

template <class T, class Scalar>
struct Head {
  const T* hidden;
  int64_t hidden_stride;
  const T* weight;
  int64_t weight_stride;
  const Scalar* bias;  // or null
  int64_t depth, vocabulary;
  Scalar softcap;               // or 0
  std::vector<int64_t> kept;    // rows of target that are not ignored
  std::vector<int64_t> source;  // for each, its row of hidden
  std::vector<int64_t> label;   // and its target
};

// `rows` in panels of up to `widest` vectors, as even as they come. What lies in panels is stored
// one panel after the other: panel p of [K][columns] begins at K * first(p).
struct Panels {
  int64_t lanes, vectors, count;

  Panels(int64_t rows, int64_t lanes_, int64_t widest)
      : lanes(lanes_), vectors(divide_up(rows, lanes)), count(divide_up(vectors, widest)) {}
  int64_t columns() const { return vectors * lanes; }
  int64_t first(int64_t panel) const { return vectors * panel / count * lanes; }
  int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
};

template <class Isa>
Panels panels_of(int64_t rows) {
  return Panels(rows, Isa::kLanes, Isa::kColumns);
}

// Calls `body` with the number of vectors of a panel as a constant.
template <class Isa, class Body>
MEMDLM_INLINE void with_width(int64_t columns, const Body& body) {
  switch (columns / Isa::kLanes) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      if constexpr (Isa::kColumns >= 2) body(std::integral_constant<int, 2>{});
      return;
    default:
      if constexpr (Isa::kColumns >= 3) body(std::integral_constant<int, 3>{});
  }
}

// --- Packing -------------------------------------------------------------------------------------

template <class T>
MEMDLM_INLINE uint32_t bits_of(const T& value) {
  uint16_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Words [first, first + count) of the weight, with zeros up to `padded` words and whole groups of
// depth: by_depth is [depth / 8][word][8 of depth], by_word [depth / 8][word / kPair][8 of depth],
// which for single elements is the same.
template <class Isa, class T>
MEMDLM_INLINE void pack_weight(const T* weight, int64_t stride, int64_t depth, int64_t count,
                               int64_t padded, typename Isa::Element* by_depth,
                               typename Isa::Element* by_word) {
  using Element = typename Isa::Element;
  const int64_t steps = divide_up(depth, Isa::kPair);
  for (int64_t word = 0; word < padded; ++word) {
    const T* row = weight + std::min(word, count - 1) * stride;
    for (int64_t group = 0; group * kGroup < steps; ++group) {
      Element* to = by_depth + (group * padded + word) * kGroup;
      const int64_t begin = group * kGroup * Isa::kPair;
      if (word >= count || begin + kGroup * Isa::kPair > depth) {
        for (int64_t i = 0; i < kGroup; ++i) {
          to[i] = 0;
          for (int64_t half = 0; half < Isa::kPair; ++half) {
            const int64_t d = begin + i * Isa::kPair + half;
            if (word >= count || d >= depth) continue;
            if constexpr (kPairs<Isa>)
              to[i] |= bits_of(row[d]) << (16 * half);
            else
              to[i] = static_cast<Element>(row[d]);
          }
        }
      } else if constexpr (kPairs<Isa> || std::is_same_v<T, Element>) {
        std::memcpy(to, row + begin, kGroup * sizeof(Element));
      } else {
        for (int64_t i = 0; i < kGroup; ++i) to[i] = static_cast<Element>(row[begin + i]);
      }
    }
  }
  if constexpr (kPairs<Isa>) {
    for (int64_t pair = 0; pair * 2 < padded; ++pair) {
      const bool whole = pair * 2 + 1 < count;
      const T* low = weight + std::min(pair * 2, count - 1) * stride;
      const T* high = whole ? low + stride : low;
      for (int64_t group = 0; group * kGroup < depth; ++group) {
        Element* to = by_word + (group * (padded / 2) + pair) * kGroup;
        const int64_t begin = group * kGroup;
        if (whole && begin + kGroup <= depth) {
          for (int64_t i = 0; i < kGroup; ++i)
            to[i] = bits_of(low[begin + i]) | bits_of(high[begin + i]) << 16;
        } else {
          for (int64_t i = 0; i < kGroup; ++i) {
            const bool inside = begin + i < depth;
            to[i] = inside && pair * 2 < count ? bits_of(low[begin + i]) : 0;
            if (inside && whole) to[i] |= bits_of(high[begin + i]) << 16;
          }
        }
      }
    }
  }
}

// One panel of hidden: [steps of depth, whole groups][rows of the panel], zeros outside.
template <class Isa, class T>
MEMDLM_INLINE void pack_hidden(const T* hidden, int64_t stride, int64_t depth,
                               const int64_t* source, int64_t rows, int64_t width,
                               typename Isa::Element* to) {
  const int64_t steps = round_up(divide_up(depth, Isa::kPair), kGroup);
  std::memset(to, 0, steps * width * sizeof(*to));
  for (int64_t m = 0; m < std::min(rows, width); ++m) {
    const T* row = hidden + source[m] * stride;
    if constexpr (kPairs<Isa>) {
      for (int64_t d = 0; d < depth; ++d) to[d / 2 * width + m] |= bits_of(row[d]) << (d % 2 * 16);
    } else {
      for (int64_t d = 0; d < depth; ++d)
        to[d * width + m] = static_cast<typename Isa::Element>(row[d]);
    }
  }
}

// The same panel of hidden by rows, `width` columns of depth from `first`: [rows / kPair][columns].
template <class Isa, class T>
MEMDLM_INLINE void pack_hidden_rows(const T* hidden, int64_t stride, int64_t depth, int64_t first,
                                    int64_t width, const int64_t* source, int64_t rows,
                                    int64_t padded_rows, typename Isa::Element* to) {
  std::memset(to, 0, padded_rows / Isa::kPair * width * sizeof(*to));
  for (int64_t m = 0; m < std::min(rows, padded_rows); ++m) {
    const T* row = hidden + source[m] * stride + first;
    typename Isa::Element* out = to + m / Isa::kPair * width;
    for (int64_t d = 0; d < std::min(width, depth - first); ++d) {
      if constexpr (kPairs<Isa>)
        out[d] |= bits_of(row[d]) << (m % 2 * 16);
      else
        out[d] = static_cast<typename Isa::Element>(row[d]);
    }
  }
}

// --- The product ---------------------------------------------------------------------------------

// Element (r, k) lies at data[r / 8 * outer + r % 8 * row + k / 8 * group + k % 8 * step].
template <class Element>
struct Operand {
  const Element* data;
  int64_t outer, row, group, step;
};

// out[r][column] = scale[column] * out[r][column] + sum over k of a(r, k) * b[k][column] for a
// panel of kWidth vectors; rows and steps are multiples of 8. Without `accumulate`, out is only
// written.
template <class Isa, int kWidth>
MEMDLM_INLINE void multiply(const Operand<typename Isa::Element>& a, const typename Isa::Element* b,
                            int64_t rows, int64_t steps, const typename Isa::Scalar* scale,
                            bool accumulate, typename Isa::Scalar* out) {
  using Vector = typename Isa::Vector;
  constexpr int kRows = Isa::kRows, kLanes = Isa::kLanes;
  constexpr int64_t kColumns = kWidth * kLanes;
  for (int64_t pass = 0; pass < steps; pass += kStepsPerPass) {
    const int64_t pass_end = std::min(steps, pass + kStepsPerPass);
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const typename Isa::Element* a_tile =
          a.data + r0 / kGroup * a.outer + r0 % kGroup * a.row + pass / kGroup * a.group;
      Vector sum[kRows][kWidth];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < kWidth; ++j) sum[r][j] = Vector{};
      for (int64_t k0 = pass; k0 < pass_end; k0 += kGroup, a_tile += a.group) {
        const typename Isa::Element* a_step = a_tile;
        const typename Isa::Element* b_step = b + k0 * kColumns;
#pragma GCC unroll 2
        for (int k = 0; k < kGroup; ++k, a_step += a.step, b_step += kColumns) {
          Vector column[kWidth];
#pragma GCC unroll 3
          for (int j = 0; j < kWidth; ++j) column[j] = load<Vector>(b_step + j * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
            for (int j = 0; j < kWidth; ++j)
              Isa::multiply_add(sum[r][j], a_step[r * a.row], column[j]);
        }
      }
      const bool first_write = !accumulate && pass == 0;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
        for (int j = 0; j < kWidth; ++j) {
          typename Isa::Scalar* at = out + (r0 + r) * kColumns + j * kLanes;
          if (!first_write && scale && pass == 0)
            sum[r][j] += load<Vector>(at) * load<Vector>(scale + j * kLanes);
          else if (!first_write)
            sum[r][j] += load<Vector>(at);
          store(at, sum[r][j]);
        }
    }
  }
}

// --- Forward -------------------------------------------------------------------------------------

// What a part of the vocabulary knows of a block of rows. The target's word is left out of all but
// its own logit: its gradient is added at the end, where it does not cancel.
template <class Scalar>
struct Partial {
  Buffer<Scalar> maximum;       // [columns]
  Buffer<Scalar> others;        // [columns] sum of exp(logit - maximum)
  Buffer<Scalar> target_logit;  // [columns] where the target lies in this part
  Buffer<Scalar> sums;  // panels of [depth][columns], sum of exp(logit - maximum) W; or null
};

struct Block {
  int64_t first_row, rows;  // of the kept rows
  int64_t first_word, last_word;
  int64_t chunk;
};

// Bias and softcap on the logits [words][kWidth vectors]; the logits of the targets are taken out
// to target_logit and become -inf, as do the words from `words` to `padded`.
template <class Isa, int kWidth>
MEMDLM_INLINE void finish_logits(typename Isa::Scalar* logits, int64_t words, int64_t padded,
                                 const typename Isa::Scalar* bias, typename Isa::Scalar softcap,
                                 const int64_t* label, int64_t rows, int64_t first_word,
                                 typename Isa::Scalar* target_logit) {
  using Scalar = typename Isa::Scalar;
  using Vector = typename Isa::Vector;
  constexpr int64_t kColumns = kWidth * Isa::kLanes;
  constexpr Scalar kMinusInfinity = -std::numeric_limits<Scalar>::infinity();
  if (bias || softcap > 0) {
    for (int64_t word = 0; word < words; ++word)
      for (int64_t column = 0; column < kColumns; column += Isa::kLanes) {
        Scalar* at = logits + word * kColumns + column;
        Vector logit = load<Vector>(at);
        if (bias) logit += bias[first_word + word];
        if (softcap > 0) logit = softcap * hyperbolic_tangent<Isa::kBytes>(logit / softcap);
        store(at, logit);
      }
  }
  for (int64_t m = 0; m < std::min(rows, kColumns); ++m) {
    const int64_t word = label[m] - first_word;
    if (word < 0 || word >= words) continue;
    target_logit[m] = logits[word * kColumns + m];
    logits[word * kColumns + m] = kMinusInfinity;
  }
  std::fill(logits + words * kColumns, logits + padded * kColumns, kMinusInfinity);
}

// To bfloat16, ties to even, left in the upper half of each lane.
template <class Bits>
MEMDLM_INLINE void round_to_bfloat16(Bits& bits) {
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
}

// Two words' values as the operand of the next product: pairs of bfloat16, or as they are.
template <class Isa>
MEMDLM_INLINE void store_words(typename Isa::Scalar* low_at, typename Isa::Scalar* high_at,
                               typename Isa::Element* pair_at, const typename Isa::Vector& low,
                               const typename Isa::Vector& high) {
  if constexpr (kPairs<Isa>) {
    typedef typename VectorOf<uint32_t, Isa::kBytes>::type Bits;
    Bits low_bits = load<Bits>(&low), high_bits = load<Bits>(&high);
    round_to_bfloat16(low_bits);
    round_to_bfloat16(high_bits);
    const Bits pair = low_bits >> 16 | high_bits;
    store(pair_at, pair);
  } else {
    store(low_at, low);
    store(high_at, high);
  }
}

// Logits to exp(logit - maximum), of which `probabilities` gets what multiplies W (the derivative
// of the softcap included), and the running maximum, sum and rescaling factor of the columns.
template <class Isa, int kWidth>
MEMDLM_INLINE void online_softmax(typename Isa::Scalar* logits, int64_t padded,
                                  typename Isa::Scalar softcap, bool need_probabilities,
                                  typename Isa::Scalar* maximum, typename Isa::Scalar* others,
                                  typename Isa::Scalar* rescale,
                                  typename Isa::Element* probabilities) {
  using Vector = typename Isa::Vector;
  constexpr int64_t kColumns = kWidth * Isa::kLanes;
  for (int64_t column = 0; column < kColumns; column += Isa::kLanes) {
    const Vector previous = load<Vector>(maximum + column);
    Vector highest = previous;
    for (int64_t word = 0; word < padded; ++word)
      highest = larger(load<Vector>(logits + word * kColumns + column), highest);
    const Vector factor = exponential<Isa::kBytes>(previous - highest);
    Vector sum_low{}, sum_high{};
    for (int64_t word = 0; word < padded; word += 2) {
      typename Isa::Scalar* low_at = logits + word * kColumns + column;
      typename Isa::Scalar* high_at = low_at + kColumns;
      Vector low = load<Vector>(low_at), high = load<Vector>(high_at);
      const Vector low_tangent = low / softcap, high_tangent = high / softcap;
      low = exponential<Isa::kBytes>(low - highest);
      high = exponential<Isa::kBytes>(high - highest);
      sum_low += low;
      sum_high += high;
      if (!need_probabilities) continue;
      if (softcap > 0) {  // where p is 0 the logit may be -inf: not a product
        low = low == 0 ? low : low * (1 - low_tangent * low_tangent);
        high = high == 0 ? high : high * (1 - high_tangent * high_tangent);
      }
      store_words<Isa>(low_at, high_at, probabilities + word / 2 * kColumns + column, low, high);
    }
    store(maximum + column, highest);
    store(rescale + column, factor);
    const Vector sum = load<Vector>(others + column) * factor + (sum_low + sum_high);
    store(others + column, sum);
  }
}

template <class Isa, int kWidth>
MEMDLM_INLINE void forward_panel(const typename Isa::Element* by_depth,
                                 const typename Isa::Element* by_word,
                                 const typename Isa::Element* hidden,
                                 const typename Isa::Scalar* bias, typename Isa::Scalar softcap,
                                 const int64_t* label, int64_t rows, int64_t depth,
                                 int64_t first_word, int64_t words, int64_t padded, bool is_first,
                                 typename Isa::Scalar* logits, typename Isa::Element* probabilities,
                                 typename Isa::Scalar* maximum, typename Isa::Scalar* others,
                                 typename Isa::Scalar* target_logit, typename Isa::Scalar* sums) {
  using Element = typename Isa::Element;
  using Scalar = typename Isa::Scalar;
  const int64_t steps = round_up(divide_up(depth, Isa::kPair), kGroup);
  multiply<Isa, kWidth>(Operand<Element>{by_depth, kGroup * kGroup, kGroup, padded * kGroup, 1},
                        hidden, padded, steps, nullptr, false, logits);
  finish_logits<Isa, kWidth>(logits, words, padded, bias, softcap, label, rows, first_word,
                             target_logit);
  Scalar rescale[kWidth * Isa::kLanes];
  online_softmax<Isa, kWidth>(logits, padded, softcap, sums != nullptr, maximum, others, rescale,
                              probabilities);
  if (!sums) return;
  const int64_t word_steps = padded / Isa::kPair;
  multiply<Isa, kWidth>(Operand<Element>{by_word, word_steps * kGroup, 1, kGroup * kGroup, kGroup},
                        probabilities, round_up(depth, kGroup), word_steps, rescale, !is_first,
                        sums);
}

// One block of rows against one part of the vocabulary.
template <class Isa, class T>
MEMDLM_INLINE void forward_block(const Head<T, typename Isa::Scalar>& head, const Block& block,
                                 Partial<typename Isa::Scalar>& partial) {
  using Element = typename Isa::Element;
  using Scalar = typename Isa::Scalar;
  const Panels panels = panels_of<Isa>(block.rows);
  const int64_t depth = head.depth;
  const int64_t steps = round_up(divide_up(depth, Isa::kPair), kGroup);
  const int64_t padded_depth = round_up(depth, kGroup);
  const int64_t width = Isa::kColumns * Isa::kLanes;  // of the widest panel
  const Buffer<Element> hidden = allocate<Element>(steps * panels.columns());
  const Buffer<Element> by_depth = allocate<Element>(steps * block.chunk);
  const Buffer<Element> pairs = allocate<Element>(kPairs<Isa> ? padded_depth * block.chunk / 2 : 0);
  const Buffer<Scalar> logits = allocate<Scalar>(block.chunk * width);
  const Buffer<Element> pair_probabilities =
      allocate<Element>(kPairs<Isa> ? block.chunk / 2 * width : 0);
  Element* by_word = by_depth.get();
  Element* probabilities;
  if constexpr (kPairs<Isa>) {
    by_word = pairs.get();
    probabilities = pair_probabilities.get();
  } else {
    probabilities = logits.get();
  }

  std::fill_n(partial.maximum.get(), panels.columns(), std::numeric_limits<Scalar>::lowest());
  std::fill_n(partial.others.get(), panels.columns(), Scalar{0});
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel);
    pack_hidden<Isa>(head.hidden, head.hidden_stride, depth,
                     head.source.data() + block.first_row + first, block.rows - first,
                     panels.width(panel), hidden.get() + steps * first);
  }
  for (int64_t word = block.first_word; word < block.last_word; word += block.chunk) {
    const int64_t words = std::min(block.chunk, block.last_word - word);
    const int64_t padded = round_up(words, kChunkMultiple);
    pack_weight<Isa>(head.weight + word * head.weight_stride, head.weight_stride, depth, words,
                     padded, by_depth.get(), by_word);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panels.first(panel);
      with_width<Isa>(panels.width(panel), [&](auto width) __attribute__((always_inline)) {
        forward_panel<Isa, decltype(width)::value>(
            by_depth.get(), by_word, hidden.get() + steps * first, head.bias, head.softcap,
            head.label.data() + block.first_row + first, block.rows - first, depth, word, words,
            padded, word == block.first_word, logits.get(), probabilities,
            partial.maximum.get() + first, partial.others.get() + first,
            partial.target_logit.get() + first,
            partial.sums ? partial.sums.get() + padded_depth * first : nullptr);
      });
    }
  }
}

// --- Backward of a head that trains --------------------------------------------------------------

template <class Scalar>
struct RowGradients {
  std::vector<Scalar> grad;         // [columns] of the row's nll; 0 where there is no row
  std::vector<Scalar> lse;          // [columns], largest where there is no row
  std::vector<Scalar> target_grad;  // [columns] of the target's logit; the part that holds the
                                    // target multiplies it by the derivative of the softcap
};

template <class T, class Scalar>
struct BackwardOutputs {
  Scalar* sums;       // panels of [depth][columns]: the part's share of grad_hidden; or null
  T* grad_weight;     // [V, D]; or null
  Scalar* grad_bias;  // [V]; or null
};

// Logits [padded][kWidth vectors] to the gradient of the loss in them, in place; 0 for the targets.
template <class Isa, int kWidth>
MEMDLM_INLINE void logits_to_gradients(typename Isa::Scalar* logits, int64_t padded,
                                       typename Isa::Scalar softcap,
                                       const typename Isa::Scalar* grad,
                                       const typename Isa::Scalar* lse) {
  using Scalar = typename Isa::Scalar;
  using Vector = typename Isa::Vector;
  constexpr int64_t kColumns = kWidth * Isa::kLanes;
  for (int64_t word = 0; word < padded; ++word)
    for (int64_t column = 0; column < kColumns; column += Isa::kLanes) {
      Scalar* at = logits + word * kColumns + column;
      const Vector logit = load<Vector>(at), tangent = logit / softcap;
      Vector value = exponential<Isa::kBytes>(logit - load<Vector>(lse + column));
      if (softcap > 0) value = value == 0 ? value : value * (1 - tangent * tangent);
      value *= load<Vector>(grad + column);
      store(at, value);
    }
}

// The gradients in bfloat16, as pairs of words [padded / 2][columns] and of rows [padded][columns /
// 2].
template <class Isa, int kWidth>
MEMDLM_INLINE void pair_gradients(const float* gradients, int64_t padded, uint32_t* word_pairs,
                                  uint32_t* row_pairs) {
  typedef typename VectorOf<uint32_t, Isa::kBytes>::type Bits;
  constexpr int64_t kColumns = kWidth * Isa::kLanes;
  for (int64_t word = 0; word < padded; word += 2) {
    const float* row = gradients + word * kColumns;
    uint32_t* row_pair = row_pairs + word * kColumns / 2;
    for (int64_t column = 0; column < kColumns; column += Isa::kLanes) {
      Bits low = load<Bits>(row + column), high = load<Bits>(row + kColumns + column);
      round_to_bfloat16(low);
      round_to_bfloat16(high);
      const Bits pair = low >> 16 | high;
      store(word_pairs + word / 2 * kColumns + column, pair);
      uint32_t low_lanes[Isa::kLanes], high_lanes[Isa::kLanes];
      store(low_lanes, low);
      store(high_lanes, high);
      for (int lane = 0; lane < Isa::kLanes; lane += 2) {
        row_pair[(column + lane) / 2] = low_lanes[lane] >> 16 | low_lanes[lane + 1];
        row_pair[(kColumns + column + lane) / 2] = high_lanes[lane] >> 16 | high_lanes[lane + 1];
      }
    }
  }
}

// One part of the vocabulary against all rows.
template <class Isa, class T>
MEMDLM_INLINE void backward_block(const Head<T, typename Isa::Scalar>& head, const Block& block,
                                  RowGradients<typename Isa::Scalar>& gradients,
                                  const BackwardOutputs<T, typename Isa::Scalar>& outputs) {
  using Element = typename Isa::Element;
  using Scalar = typename Isa::Scalar;
  const Panels panels = panels_of<Isa>(block.rows), depth_panels = panels_of<Isa>(head.depth);
  const int64_t depth = head.depth;
  const int64_t steps = round_up(divide_up(depth, Isa::kPair), kGroup);
  const int64_t padded_depth = round_up(depth, kGroup);
  const int64_t width = Isa::kColumns * Isa::kLanes;
  const Buffer<Element> hidden = allocate<Element>(steps * panels.columns());
  const Buffer<Element> hidden_rows = allocate<Element>(
      outputs.grad_weight ? panels.columns() / Isa::kPair * depth_panels.columns() : 0);
  const Buffer<Element> by_depth = allocate<Element>(steps * block.chunk);
  const Buffer<Element> pairs = allocate<Element>(kPairs<Isa> ? padded_depth * block.chunk / 2 : 0);
  const Buffer<Scalar> logits = allocate<Scalar>(block.chunk * width);
  const Buffer<Element> word_pairs = allocate<Element>(kPairs<Isa> ? block.chunk / 2 * width : 0);
  const Buffer<Element> row_pairs = allocate<Element>(kPairs<Isa> ? block.chunk * width / 2 : 0);
  const Buffer<Scalar> chunk_grad =
      allocate<Scalar>(outputs.grad_weight ? block.chunk * depth_panels.columns() : 0);
  std::vector<double> chunk_bias_grad(block.chunk);
  std::vector<Scalar> target_logit(panels.columns());
  Element *by_word = by_depth.get(), *gradient_words, *gradient_rows;
  if constexpr (kPairs<Isa>) {
    by_word = pairs.get();
    gradient_words = word_pairs.get();
    gradient_rows = row_pairs.get();
  } else {
    gradient_words = gradient_rows = logits.get();
  }
  // Panel p of hidden by rows: for every panel q of depth [rows of p / kPair][columns of q].
  const auto rows_of = [&](int64_t panel, int64_t depth_panel) {
    return hidden_rows.get() + (panels.first(panel) * depth_panels.columns() +
                                panels.width(panel) * depth_panels.first(depth_panel)) /
                                   Isa::kPair;
  };

  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel);
    const int64_t* source = head.source.data() + block.first_row + first;
    pack_hidden<Isa>(head.hidden, head.hidden_stride, depth, source, block.rows - first,
                     panels.width(panel), hidden.get() + steps * first);
    if (!outputs.grad_weight) continue;
    for (int64_t q = 0; q < depth_panels.count; ++q)
      pack_hidden_rows<Isa>(head.hidden, head.hidden_stride, depth, depth_panels.first(q),
                            depth_panels.width(q), source, block.rows - first, panels.width(panel),
                            rows_of(panel, q));
  }
  for (int64_t word = block.first_word; word < block.last_word; word += block.chunk) {
    const int64_t words = std::min(block.chunk, block.last_word - word);
    const int64_t padded = round_up(words, kChunkMultiple);
    pack_weight<Isa>(head.weight + word * head.weight_stride, head.weight_stride, depth, words,
                     padded, by_depth.get(), by_word);
    std::fill(chunk_bias_grad.begin(), chunk_bias_grad.end(), 0.0);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panels.first(panel), columns = panels.width(panel);
      const int64_t* label = head.label.data() + block.first_row + first;
      with_width<Isa>(columns, [&](auto width_constant) __attribute__((always_inline)) {
        constexpr int kWidth = decltype(width_constant)::value;
        multiply<Isa, kWidth>(
            Operand<Element>{by_depth.get(), kGroup * kGroup, kGroup, padded * kGroup, 1},
            hidden.get() + steps * first, padded, steps, nullptr, false, logits.get());
        finish_logits<Isa, kWidth>(logits.get(), words, padded, head.bias, head.softcap, label,
                                   block.rows - first, word, target_logit.data() + first);
        logits_to_gradients<Isa, kWidth>(logits.get(), padded, head.softcap,
                                         gradients.grad.data() + first,
                                         gradients.lse.data() + first);
        if (outputs.grad_bias)
          for (int64_t i = 0; i < words; ++i)
            for (int64_t m = 0; m < columns; ++m) chunk_bias_grad[i] += logits[i * columns + m];
        if constexpr (kPairs<Isa>)
          pair_gradients<Isa, kWidth>(logits.get(), padded, gradient_words, gradient_rows);
        if (outputs.sums) {
          const int64_t word_steps = padded / Isa::kPair;
          multiply<Isa, kWidth>(
              Operand<Element>{by_word, word_steps * kGroup, 1, kGroup * kGroup, kGroup},
              gradient_words, padded_depth, word_steps, nullptr, word != block.first_word,
              outputs.sums + padded_depth * first);
        }
      });
      if (!outputs.grad_weight) continue;
      const int64_t row_steps = columns / Isa::kPair;
      for (int64_t q = 0; q < depth_panels.count; ++q)
        with_width<Isa>(
            depth_panels.width(q), [&](auto width_constant) __attribute__((always_inline)) {
              multiply<Isa, decltype(width_constant)::value>(
                  Operand<Element>{gradient_rows, kGroup * row_steps, row_steps, kGroup, 1},
                  rows_of(panel, q), padded, row_steps, nullptr, panel > 0,
                  chunk_grad.get() + padded * depth_panels.first(q));
            });
    }
    // The targets' own share, the larger part for a confident token, in Scalar.
    for (int64_t m = 0; m < block.rows; ++m) {
      const int64_t i = head.label[block.first_row + m] - word;
      if (i < 0 || i >= words) continue;
      const Scalar tangent = head.softcap > 0 ? target_logit[m] / head.softcap : 0;
      const Scalar grad = gradients.target_grad[m] *= 1 - tangent * tangent;
      chunk_bias_grad[i] += grad;
      if (!outputs.grad_weight) continue;
      const T* row = head.hidden + head.source[block.first_row + m] * head.hidden_stride;
      for (int64_t q = 0; q < depth_panels.count; ++q) {
        const int64_t first = depth_panels.first(q), columns = depth_panels.width(q);
        Scalar* to = chunk_grad.get() + padded * first + i * columns;
        for (int64_t d = 0; d < std::min(columns, depth - first); ++d)
          to[d] += grad * static_cast<Scalar>(row[first + d]);
      }
    }
    if (outputs.grad_bias) std::copy_n(chunk_bias_grad.begin(), words, outputs.grad_bias + word);
    if (!outputs.grad_weight) continue;
    for (int64_t q = 0; q < depth_panels.count; ++q) {
      const int64_t first = depth_panels.first(q), columns = depth_panels.width(q);
      for (int64_t i = 0; i < words; ++i) {
        const Scalar* from = chunk_grad.get() + padded * first + i * columns;
        T* to = outputs.grad_weight + (word + i) * depth + first;
        for (int64_t d = 0; d < std::min(columns, depth - first); ++d) to[d] = T(from[d]);
      }
    }
  }
}

// --- One compiled version for each instruction set -----------------------------------------------

template <class T, class Scalar>
struct Kernel {
  void (*forward)(const Head<T, Scalar>&, const Block&, Partial<Scalar>&);
  void (*backward)(const Head<T, Scalar>&, const Block&, RowGradients<Scalar>&,
                   const BackwardOutputs<T, Scalar>&);
  Panels (*panels)(int64_t rows);
  int64_t widest_panel;   // columns
  int64_t element_bytes;  // packed, for each element of the weight
};

#define MEMDLM_COMPILE_FOR(Name, Isa, target)                                    \
  template <class T>                                                             \
  struct Name {                                                                  \
    using Scalar = Isa::Scalar;                                                  \
    target static void forward(const Head<T, Scalar>& head, const Block& block,  \
                               Partial<Scalar>& partial) {                       \
      forward_block<Isa>(head, block, partial);                                  \
    }                                                                            \
    target static void backward(const Head<T, Scalar>& head, const Block& block, \
                                RowGradients<Scalar>& gradients,                 \
                                const BackwardOutputs<T, Scalar>& outputs) {     \
      backward_block<Isa>(head, block, gradients, outputs);                      \
    }                                                                            \
    static Kernel<T, Scalar> kernel() {                                          \
      return {forward, backward, panels_of<Isa>, Isa::kColumns * Isa::kLanes,    \
              static_cast<int64_t>(sizeof(Isa::Element)) / Isa::kPair};          \
    }                                                                            \
  }

MEMDLM_COMPILE_FOR(ForFloat64, Float64, );
MEMDLM_COMPILE_FOR(ForBaseline, Baseline, );
MEMDLM_COMPILE_FOR(ForAvx2, Avx2, MEMDLM_AVX2);
MEMDLM_COMPILE_FOR(ForAvx512, Avx512, MEMDLM_AVX512);
MEMDLM_COMPILE_FOR(ForAvx512Bf16, PairsOfBFloat16, MEMDLM_AVX512_BF16);

template <class T, class Scalar>
Kernel<T, Scalar> choose_kernel() {
  if constexpr (std::is_same_v<T, double>) {
    return ForFloat64<T>::kernel();
  } else {
    const InstructionSet best = instruction_set();
    if constexpr (std::is_same_v<T, BFloat16>)
      if (best == InstructionSet::kAvx512Bf16) return ForAvx512Bf16<T>::kernel();
    if (best >= InstructionSet::kAvx512) return ForAvx512<T>::kernel();
    if (best == InstructionSet::kAvx2) return ForAvx2<T>::kernel();
    return ForBaseline<T>::kernel();
  }
}

// --- The driver ----------------------------------------------------------------------------------

// Joins the parts of the vocabulary for row m of a block, and writes the row's results.
template <class T, class Scalar>
void finish_row(const Head<T, Scalar>& head, const Panels& panels, int64_t first_row, int64_t m,
                const Block* blocks, const Partial<Scalar>* partials, int64_t parts, Scalar* nll,
                Scalar* lse, Scalar* stash) {
  const int64_t row = head.kept[first_row + m], label = head.label[first_row + m];
  double maximum = -std::numeric_limits<double>::infinity(), others = 0, target_logit = 0;
  for (int64_t part = 0; part < parts; ++part) {
    maximum = std::max<double>(maximum, partials[part].maximum[m]);
    if (blocks[part].first_word <= label && label < blocks[part].last_word)
      target_logit = partials[part].target_logit[m];
  }
  for (int64_t part = 0; part < parts; ++part)
    others += partials[part].others[m] * std::exp(partials[part].maximum[m] - maximum);
  const double loss = nll_of(maximum, others, target_logit);
  nll[row] = static_cast<Scalar>(loss);
  lse[row] = static_cast<Scalar>(target_logit + loss);
  if (!stash) return;

  const double capped = head.softcap > 0 ? target_logit / head.softcap : 0;
  const Scalar target_scale = static_cast<Scalar>(std::expm1(-loss) * (1 - capped * capped));
  const T* target_weight = head.weight + label * head.weight_stride;
  Scalar* to = stash + row * head.depth;
  for (int64_t d = 0; d < head.depth; ++d)
    to[d] = target_scale * static_cast<Scalar>(target_weight[d]);
  int64_t panel = 0;
  while (panels.first(panel + 1) <= m) ++panel;
  const int64_t columns = panels.width(panel), first = panels.first(panel);
  for (int64_t part = 0; part < parts; ++part) {
    const Scalar scale =
        static_cast<Scalar>(std::exp(partials[part].maximum[m] - (target_logit + loss)));
    const Scalar* from =
        partials[part].sums.get() + round_up(head.depth, kGroup) * first + (m - first);
    for (int64_t d = 0; d < head.depth; ++d) to[d] += scale * from[d * columns];
  }
}

// A part of the work for each thread: rows are split while every block stays large enough to pay
// for reading the weight, then the vocabulary.
struct Partition {
  int64_t row_blocks, parts;
};

Partition partition(int64_t rows, int64_t threads) {
  if (rows >= threads * kRowsPerBlock / 2)
    return {threads * divide_up(rows, threads * kRowsPerBlock), 1};
  const int64_t row_blocks = divide_up(rows, kRowsPerBlock);
  return {row_blocks, divide_up(threads, row_blocks)};
}

int64_t words_per_chunk(std::optional<int64_t> chunk_bytes, int64_t depth, int64_t element_bytes,
                        int64_t logits_bytes_per_word, int64_t words) {
  const int64_t wanted =
      chunk_bytes ? *chunk_bytes / logits_bytes_per_word
                  : std::max(kSmallestChunk,
                             kPackedChunkBytes / std::max<int64_t>(depth * element_bytes, 1));
  const int64_t whole = wanted / kChunkMultiple * kChunkMultiple;
  return std::clamp(whole, kChunkMultiple, round_up(words, kChunkMultiple));
}

template <class T, class Scalar>
Head<T, Scalar> make_head(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                          const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
                          int64_t ignore_index, std::optional<double> softcap) {
  Head<T, Scalar> head;
  head.hidden = static_cast<const T*>(hidden.const_data_ptr());
  head.hidden_stride = hidden.stride(0);
  head.weight = static_cast<const T*>(weight.const_data_ptr());
  head.weight_stride = weight.stride(0);
  head.bias = bias ? static_cast<const Scalar*>(bias->const_data_ptr()) : nullptr;
  head.depth = weight.size(1);
  head.vocabulary = weight.size(0);
  head.softcap = static_cast<Scalar>(softcap.value_or(0));
  const auto* labels = static_cast<const int64_t*>(target.const_data_ptr());
  const auto* sources = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
  for (int64_t row = 0; row < target.numel(); ++row) {
    if (labels[row] == ignore_index) continue;
    STD_TORCH_CHECK(0 <= labels[row] && labels[row] < head.vocabulary, "target out of range");
    const int64_t source = sources ? sources[row] : row;
    STD_TORCH_CHECK(0 <= source && source < hidden.size(0), "index out of range");
    head.kept.push_back(row);
    head.source.push_back(source);
    head.label.push_back(labels[row]);
  }
  return head;
}

template <class T, class Scalar>
void forward(const Head<T, Scalar>& head, std::optional<int64_t> chunk_bytes, Scalar* nll,
             Scalar* lse, Scalar* stash) {
  const auto rows = static_cast<int64_t>(head.kept.size());
  if (rows == 0) return;
  const Kernel<T, Scalar> kernel = choose_kernel<T, Scalar>();
  const Partition split = partition(rows, torch::stable::get_num_threads());
  const int64_t words_per_part = round_up(divide_up(head.vocabulary, split.parts), kChunkMultiple);
  const int64_t parts = divide_up(head.vocabulary, words_per_part);  // none is empty
  const int64_t chunk =
      words_per_chunk(chunk_bytes, head.depth, kernel.element_bytes,
                      kernel.widest_panel * static_cast<int64_t>(sizeof(Scalar)), words_per_part);

  const auto first_row = [&](int64_t row_block) { return rows * row_block / split.row_blocks; };
  std::vector<Block> blocks(split.row_blocks * parts);
  std::vector<Partial<Scalar>> partials(blocks.size());
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    const int64_t first = first_row(i / parts), word = i % parts * words_per_part;
    blocks[i] = {first, first_row(i / parts + 1) - first, word,
                 std::min(word + words_per_part, head.vocabulary), chunk};
  }
  const auto finish = [&](int64_t row_block, int64_t begin, int64_t end) {
    const Panels panels = kernel.panels(blocks[row_block * parts].rows);
    for (int64_t m = begin; m < end; ++m)
      finish_row(head, panels, first_row(row_block), m, &blocks[row_block * parts],
                 &partials[row_block * parts], parts, nll, lse, stash);
  };
  torch::stable::parallel_for(
      0, static_cast<int64_t>(blocks.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t columns = kernel.panels(blocks[i].rows).columns();
          partials[i] = {
              allocate<Scalar>(columns), allocate<Scalar>(columns), allocate<Scalar>(columns),
              stash ? allocate<Scalar>(columns * round_up(head.depth, kGroup)) : Buffer<Scalar>()};
          kernel.forward(head, blocks[i], partials[i]);
          if (parts > 1) continue;
          finish(i, 0, blocks[i].rows);
          partials[i] = {};
        }
      });
  if (parts == 1) return;
  for (int64_t row_block = 0; row_block < split.row_blocks; ++row_block)
    torch::stable::parallel_for(0, blocks[row_block * parts].rows, 16,
                                [&](int64_t begin, int64_t end) { finish(row_block, begin, end); });
}

template <class T, class Scalar>
void backward(const Head<T, Scalar>& head, std::optional<int64_t> chunk_bytes,
              const Scalar* grad_nll, const Scalar* nll, const Scalar* lse, Scalar* grad_rows,
              T* grad_weight, Scalar* grad_bias) {
  const auto rows = static_cast<int64_t>(head.kept.size());
  if (rows == 0) {
    if (grad_weight) std::fill_n(grad_weight, head.vocabulary * head.depth, T(0));
    if (grad_bias) std::fill_n(grad_bias, head.vocabulary, Scalar{0});
    return;
  }
  const Kernel<T, Scalar> kernel = choose_kernel<T, Scalar>();
  const Panels panels = kernel.panels(rows);
  const int64_t padded_depth = round_up(head.depth, kGroup);
  const int64_t sums_bytes = padded_depth * panels.columns() * static_cast<int64_t>(sizeof(Scalar));
  const int64_t most_parts =
      grad_rows ? std::max<int64_t>(1, kMostPartialBytes / sums_bytes) : rows + head.vocabulary;
  const int64_t wanted = std::min<int64_t>(torch::stable::get_num_threads(), most_parts);
  const int64_t words_per_part = round_up(divide_up(head.vocabulary, wanted), kChunkMultiple);
  const int64_t parts = divide_up(head.vocabulary, words_per_part);
  const int64_t chunk =
      words_per_chunk(chunk_bytes, head.depth, kernel.element_bytes,
                      kernel.widest_panel * static_cast<int64_t>(sizeof(Scalar)), words_per_part);

  RowGradients<Scalar> gradients;
  gradients.grad.resize(panels.columns(), Scalar{0});
  gradients.lse.resize(panels.columns(), std::numeric_limits<Scalar>::max());
  gradients.target_grad.resize(panels.columns(), Scalar{0});
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t row = head.kept[m];
    gradients.grad[m] = grad_nll[row];
    gradients.lse[m] = lse[row];
    gradients.target_grad[m] = grad_nll[row] * std::expm1(-nll[row]);
  }
  std::vector<Buffer<Scalar>> sums(parts);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      if (grad_rows) sums[part] = allocate<Scalar>(padded_depth * panels.columns());
      const int64_t first_word = part * words_per_part;
      kernel.backward(
          head,
          {0, rows, first_word, std::min(first_word + words_per_part, head.vocabulary), chunk},
          gradients, {sums[part].get(), grad_weight, grad_bias});
    }
  });
  if (!grad_rows) return;
  torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panels.first(panel), columns = panels.width(panel);
      for (int64_t m = first; m < std::min(first + columns, rows); ++m) {
        const T* target_weight = head.weight + head.label[m] * head.weight_stride;
        for (int64_t d = 0; d < head.depth; ++d) {
          Scalar sum = gradients.target_grad[m] * static_cast<Scalar>(target_weight[d]);
          for (const Buffer<Scalar>& part : sums)
            sum += part[padded_depth * first + d * columns + (m - first)];
          grad_rows[head.kept[m] * head.depth + d] = sum;
        }
      }
    }
  });
}

// --- The boundary --------------------------------------------------------------------------------

ScalarType check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& index) {
  const ScalarType dtype = hidden.scalar_type();
  const ScalarType scalar = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_rows(hidden, "hidden", dtype);
  check_rows(weight, "weight", dtype);
  check_tensor(target, "target", ScalarType::Long, target.numel());
  if (bias) check_tensor(*bias, "bias", scalar, weight.size(0));
  if (index) check_tensor(*index, "index", ScalarType::Long, target.numel());
  return scalar;
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
      STD_TORCH_CHECK(false, "hidden must be float32, bfloat16, float16 or float64");
  }
}

// Rows that are ignored keep the zeros.
template <class Scalar>
Scalar* zeroed(const Tensor& tensor) {
  auto* data = static_cast<Scalar*>(tensor.mutable_data_ptr());
  std::fill_n(data, tensor.numel(), Scalar{0});
  return data;
}

void masked_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target,
                                 std::optional<Tensor> bias, std::optional<Tensor> index,
                                 int64_t ignore_index, std::optional<double> softcap,
                                 std::optional<int64_t> chunk_bytes, Tensor nll, Tensor lse,
                                 std::optional<Tensor> stash) {
  const ScalarType scalar = check_inputs(hidden, weight, target, bias, index);
  check_tensor(nll, "nll", scalar, target.numel());
  check_tensor(lse, "lse", scalar, target.numel());
  if (stash) check_tensor(*stash, "stash", scalar, target.numel() * weight.size(1));
  with_dtype(hidden.scalar_type(), [&]<class T, class Scalar>(T, Scalar) {
    forward(make_head<T, Scalar>(hidden, weight, target, bias, index, ignore_index, softcap),
            chunk_bytes, zeroed<Scalar>(nll), zeroed<Scalar>(lse),
            stash ? zeroed<Scalar>(*stash) : nullptr);
  });
}

void masked_linear_cross_entropy_backward(Tensor grad_nll, Tensor hidden, Tensor weight,
                                          Tensor target, std::optional<Tensor> bias,
                                          std::optional<Tensor> index, Tensor nll, Tensor lse,
                                          int64_t ignore_index, std::optional<double> softcap,
                                          std::optional<int64_t> chunk_bytes,
                                          std::optional<Tensor> grad_rows,
                                          std::optional<Tensor> grad_weight,
                                          std::optional<Tensor> grad_bias) {
  const ScalarType scalar = check_inputs(hidden, weight, target, bias, index);
  check_tensor(grad_nll, "grad_nll", scalar, target.numel());
  check_tensor(nll, "nll", scalar, target.numel());
  check_tensor(lse, "lse", scalar, target.numel());
  if (grad_rows) check_tensor(*grad_rows, "grad_rows", scalar, target.numel() * weight.size(1));
  if (grad_weight) check_tensor(*grad_weight, "grad_weight", weight.scalar_type(), weight.numel());
  if (grad_bias) check_tensor(*grad_bias, "grad_bias", scalar, weight.size(0));
  with_dtype(hidden.scalar_type(), [&]<class T, class Scalar>(T, Scalar) {
    backward(make_head<T, Scalar>(hidden, weight, target, bias, index, ignore_index, softcap),
             chunk_bytes, static_cast<const Scalar*>(grad_nll.const_data_ptr()),
             static_cast<const Scalar*>(nll.const_data_ptr()),
             static_cast<const Scalar*>(lse.const_data_ptr()),
             grad_rows ? zeroed<Scalar>(*grad_rows) : nullptr,
             grad_weight ? static_cast<T*>(grad_weight->mutable_data_ptr()) : nullptr,
             grad_bias ? static_cast<Scalar*>(grad_bias->mutable_data_ptr()) : nullptr);
  });
}

// out[row] = sum of scale[m] * rows[m] over the m with index[m] = row (m itself without an index),
// in float32 until the one rounding; zeros where there is none.
void scatter_rows(std::optional<Tensor> scale, Tensor rows, std::optional<Tensor> index,
                  Tensor out) {
  const int64_t count = rows.size(0), out_rows = out.size(0), depth = out.size(1);
  check_tensor(rows, "rows", rows.scalar_type(), count * depth);
  if (scale) check_tensor(*scale, "scale", rows.scalar_type(), count);
  if (index) check_tensor(*index, "index", ScalarType::Long, count);
  check_tensor(out, "out", out.scalar_type(), out_rows * depth);
  const auto* destination = index ? static_cast<const int64_t*>(index->const_data_ptr()) : nullptr;
  // The m of row r are order[first[r]] to order[first[r + 1]], ascending.
  std::vector<int64_t> first(out_rows + 1), order(count);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t row = destination ? destination[m] : m;
    STD_TORCH_CHECK(0 <= row && row < out_rows, "index out of range");
    ++first[row + 1];
  }
  for (int64_t row = 0; row < out_rows; ++row) first[row + 1] += first[row];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t m = 0; m < count; ++m) order[next[destination ? destination[m] : m]++] = m;

  with_dtype(out.scalar_type(), [&]<class T, class Scalar>(T, Scalar) {
    STD_TORCH_CHECK(rows.scalar_type() ==
                        (std::is_same_v<Scalar, double> ? ScalarType::Double : ScalarType::Float),
                    "rows must be float64 for float64 out, else float32");
    const auto* from = static_cast<const Scalar*>(rows.const_data_ptr());
    const auto* factor = scale ? static_cast<const Scalar*>(scale->const_data_ptr()) : nullptr;
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, out_rows, 64, [&](int64_t begin, int64_t end) {
      std::vector<Scalar> sum(depth);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sum.begin(), sum.end(), Scalar{0});
        for (int64_t i = first[row]; i < first[row + 1]; ++i) {
          const Scalar by = factor ? factor[order[i]] : 1;
          for (int64_t d = 0; d < depth; ++d) sum[d] += by * from[order[i] * depth + d];
        }
        for (int64_t d = 0; d < depth; ++d) to[row * depth + d] = T(sum[d]);
      }
    });
  });
}

}  // namespace
}  // namespace memdlm

STABLE_TORCH_LIBRARY_IMPL(memdlm_C, CPU, m) {
  m.impl("masked_linear_cross_entropy", TORCH_BOX(&memdlm::masked_linear_cross_entropy));
  m.impl("masked_linear_cross_entropy_backward",
         TORCH_BOX(&memdlm::masked_linear_cross_entropy_backward));
  m.impl("scatter_rows", TORCH_BOX(&memdlm::scatter_rows));
}
