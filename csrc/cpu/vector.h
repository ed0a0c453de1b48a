// Vectors of one register, and the functions of them that a softmax needs. Everything is inlined
// into a caller that is compiled for the instruction set it runs on (see instruction_set.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Vectors are passed between inlined functions only: their calling convention does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

#define MEMDLM_INLINE inline __attribute__((always_inline))

namespace memdlm {

template <class Scalar, int kBytes>
struct VectorOf {
  typedef Scalar type __attribute__((vector_size(kBytes)));
};

template <class Vector, class Scalar>
MEMDLM_INLINE Vector load(const Scalar* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Vector, class Scalar>
MEMDLM_INLINE void store(Scalar* to, const Vector& value) {
  std::memcpy(to, &value, sizeof(value));
}

template <class Vector>
MEMDLM_INLINE Vector larger(const Vector& a, const Vector& b) {
  return a > b ? a : b;
}

// e^x for x <= 88, below -87 exactly 0, nan for nan. Within 2 units in the last place.
template <int kBytes>
MEMDLM_INLINE typename VectorOf<float, kBytes>::type exponential(
    const typename VectorOf<float, kBytes>::type& x) {
  typedef typename VectorOf<float, kBytes>::type Vector;
  typedef typename VectorOf<uint32_t, kBytes>::type Bits;
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds x / ln 2 to the integer n in the lowest mantissa bits.
  const float round_to_integer = 12582912.0f;
  const Vector shifted = x * 1.44269504f + round_to_integer;
  const Vector n = shifted - round_to_integer;
  Vector r = x - n * 0.693359375f;  // few bits: the product is exact
  r = r + n * 2.12194440e-4f;
  // Taylor up to r^7: |r| <= 0.35, so the rest is below 1e-8.
  Vector sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (uint32_t{127} << 23);  // the exponent n; the shift drops 1.5 * 2^23
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? Vector{} : sum * power;
}

// float64 is for checking gradients, not for speed.
template <int kBytes>
MEMDLM_INLINE typename VectorOf<double, kBytes>::type exponential(
    const typename VectorOf<double, kBytes>::type& x) {
  typename VectorOf<double, kBytes>::type result;
  for (int lane = 0; lane < kBytes / 8; ++lane) result[lane] = std::exp(x[lane]);
  return result;
}

template <int kBytes>
MEMDLM_INLINE typename VectorOf<float, kBytes>::type hyperbolic_tangent(
    const typename VectorOf<float, kBytes>::type& x) {
  typedef typename VectorOf<float, kBytes>::type Vector;
  const Vector size = x < 0.0f ? -x : x;
  // 1 - 2 / (e^2x + 1) cancels near 0, where five terms of the series are exact enough.
  const Vector square = x * x;
  Vector series = square * (62.0f / 2835) - 17.0f / 315;
  series = series * square + 2.0f / 15;
  series = series * square - 1.0f / 3;
  series = series * square * x + x;
  const Vector capped = size > 20.0f ? Vector{} + 20.0f : size;  // tanh(20) is 1
  const Vector tail = 1.0f - 2.0f / (exponential<kBytes>(capped * 2.0f) + 1.0f);
  return size < 0.3f ? series : (x < 0.0f ? -tail : tail);
}

template <int kBytes>
MEMDLM_INLINE typename VectorOf<double, kBytes>::type hyperbolic_tangent(
    const typename VectorOf<double, kBytes>::type& x) {
  typename VectorOf<double, kBytes>::type result;
  for (int lane = 0; lane < kBytes / 8; ++lane) result[lane] = std::tanh(x[lane]);
  return result;
}

}  // namespace memdlm
