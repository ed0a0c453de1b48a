// What both kernels of fast weights share: a row cut into chunks, and a chunk into pieces.
//
// A row's segments may be one of 50 million columns or thousands of a few hundred, and only the
// device knows. So the grid is cut by columns alone, into chunks of a fixed size, and each chunk
// finds its segments. A piece is the part of one segment in one chunk: a whole block works on a
// long one, and the warps share out the short ones, so that neither a block waits for one warp nor
// 256 threads for ten columns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fast_weight.h"

// Tests on a CPU cut short rows into many chunks.
#ifndef MEMDLM_FAST_WEIGHT_CHUNK
#define MEMDLM_FAST_WEIGHT_CHUNK 16384
#endif

namespace memdlm {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Every block of an update reads one double for each chunk of its row: large chunks keep that
// small beside the row itself. 16,384 columns are 16 loads of 16 bytes a thread in float32.
constexpr int kChunk = MEMDLM_FAST_WEIGHT_CHUNK;
// Columns of a piece from which on a block is worth its barriers: below, a warp has at most 16
// rounds of 16-byte loads to do.
constexpr int kLong = kChunk / 8;
constexpr int kLoad = 16;  // bytes: the widest load and store

template <class T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// A double on its way to 16 bits is rounded to float first, as torch does it.
template <class T, class W>
__device__ inline T narrow(W x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>()) with the type of a dtype. A switch on a kernel's argument costs a uniform
// branch, and saves a kernel for each dtype. The pragma: a body runs where it was written, on the
// host or the device, which nvcc cannot see.
#pragma nv_exec_check_disable
template <class Body>
__host__ __device__ inline void with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Type<float>());
    case Dtype::kBFloat16:
      return body(Type<__nv_bfloat16>());
    case Dtype::kFloat16:
      return body(Type<__half>());
    case Dtype::kFloat64:
      return body(Type<double>());
  }
}

// N adjacent elements in registers.
template <class T, int N>
struct Pack {
  T value[N];
};

template <int kBytes>
using Word =
    std::conditional_t<kBytes % 16 == 0, uint4,
                       std::conditional_t<kBytes % 8 == 0, uint2,
                                          std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>>>;

// Whether a Pack<T, N> at this address may be moved in words.
template <class T, int N>
__device__ inline bool is_aligned(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Word<N * sizeof(T)>) == 0;
}

// `kLast`: nobody reads it again soon, so it should leave the L2 cache first.
template <int N, bool kLast, class T>
__device__ inline Pack<T, N> load(const T* address) {
  using W = Word<N * sizeof(T)>;
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / sizeof(W)); ++i) {
    const W* from = reinterpret_cast<const W*>(address) + i;
    const W word = kLast ? __ldcs(from) : __ldg(from);
    memcpy(reinterpret_cast<char*>(pack.value) + i * sizeof(W), &word, sizeof(W));
  }
  return pack;
}

template <int N, class T>
__device__ inline void store(T* address, const Pack<T, N>& pack) {
  using W = Word<N * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / sizeof(W)); ++i) {
    W word;
    memcpy(&word, reinterpret_cast<const char*>(pack.value) + i * sizeof(W), sizeof(W));
    __stcs(reinterpret_cast<W*>(address) + i, word);
  }
}

// The copy of param in another dtype: `pack`, param's new values, at `column` of a row.
template <int N, class T>
__device__ inline void store_cast(const Flat<void*>& cast, int64_t row, int64_t column,
                                  const Pack<T, N>& pack) {
  if (cast.data == nullptr) return;
  with_type(cast.dtype, [&](auto type) {
    using C = typename decltype(type)::type;
    Pack<C, N> rounded;
#pragma unroll
    for (int i = 0; i < N; ++i) rounded.value[i] = narrow<C>(widen(pack.value[i]));
    store<N>(static_cast<C*>(cast.data) + row * cast.stride + column, rounded);
  });
}

// Whether store_cast<N> may run from `column` on.
template <int N>
__device__ inline bool is_cast_aligned(const Flat<void*>& cast, int64_t row, int64_t column) {
  bool aligned = true;
  if (cast.data == nullptr) return aligned;
  with_type(cast.dtype, [&](auto type) {
    using C = typename decltype(type)::type;
    aligned = is_aligned<C, N>(static_cast<const C*>(cast.data) + row * cast.stride + column);
  });
  return aligned;
}

// At least one chunk to a row: an empty row has a result too.
__host__ __device__ inline int64_t chunk_count(int64_t columns) {
  return columns == 0 ? 1 : (columns + kChunk - 1) / kChunk;
}

// Chunks and segments are numbered in 32 bits (see launch), columns in 64.
// The index-th kChunk columns of a row and the segments that may have columns there: first to last,
// both included. `last` may be the number of segments, which stands for an empty one after the
// last. The last segment of a chunk is the first of the next, whether or not it reaches into both;
// the first chunk starts at segment 0 and the last ends at the number of segments. So chunk +
// segment counts up by one through all pairs of all chunks: it numbers the pairs without gaps.
struct Chunk {
  int index, first, last;
};

// The first of the segments low:high that ends after `column`, else high; the whole block asks.
// 256 probes at a time find one of 65,536 in two rounds, where halving would wait 16 times for the
// memory.
__device__ inline int first_ending_after(const int64_t* segments, int low, int high,
                                         int64_t column) {
  while (low < high) {
    // Probes lie `step` apart, the last of them at or beyond the end.
    const int step = (high - low - 1) / kThreads + 1;
    const int64_t probe = low + (int64_t{threadIdx.x} + 1) * step - 1;
    const int passed = __syncthreads_count(probe < high && __ldg(segments + probe + 1) <= column);
    const int64_t bound = low + (int64_t{passed} + 1) * step - 1;
    low += passed * step;
    high = bound < high ? static_cast<int>(bound) : high;
  }
  return low;
}

__device__ inline Chunk find_chunk(int index, const int64_t* segments, int64_t columns, int count) {
  const int64_t begin = int64_t{index} * kChunk;
  const int first = index == 0 ? 0 : first_ending_after(segments, 0, count, begin);
  const int last = index + 1 == chunk_count(columns)
                       ? count
                       : first_ending_after(segments, first, count, begin + kChunk);
  return {index, first, last};
}

// Columns begin:begin + length of one segment.
struct Piece {
  int64_t begin;
  int length, segment;
  bool owned;  // by this chunk: each segment by one chunk, where it begins
};

// `segments` of `columns` columns in all.
__device__ inline Piece make_piece(const Chunk& chunk, const int64_t* segments, int count,
                                   int64_t columns, int segment) {
  if (segment == count) return {columns, 0, segment, false};
  const int64_t chunk_begin = int64_t{chunk.index} * kChunk;
  const int64_t chunk_end = chunk_begin + kChunk < columns ? chunk_begin + kChunk : columns;
  const int64_t low = __ldg(segments + segment), high = __ldg(segments + segment + 1);
  const int64_t begin = low > chunk_begin ? low : chunk_begin;
  const int64_t end = high < chunk_end ? high : chunk_end;
  // An empty segment is a candidate of one chunk only.
  const bool owned = low == high || (low >= chunk_begin && low < chunk_end);
  return {begin, end > begin ? static_cast<int>(end - begin) : 0, segment, owned};
}

// Some threads that work on one piece: a block or a warp of it.
struct Team {
  int rank, size;
  __device__ bool is_block() const { return size == kThreads; }
};

// Calls body(piece, team) for each piece of the chunk; all threads of a team call it together.
template <class Body>
__device__ inline void for_each_piece(const Chunk& chunk, const int64_t* segments, int count,
                                      int64_t columns, Body body) {
  const int thread = static_cast<int>(threadIdx.x);
  // One loop for both sizes of team, so that the compiler makes one copy of the body.
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const bool block = pass == 0;
    const Team team = block ? Team{thread, kThreads} : Team{thread % kWarp, kWarp};
#pragma unroll 1
    for (int segment = chunk.first + (block ? 0 : thread / kWarp); segment <= chunk.last;
         segment += block ? 1 : kWarps) {
      const Piece piece = make_piece(chunk, segments, count, columns, segment);
      if ((piece.length >= kLong) == block) body(piece, team);
    }
  }
}

inline const char* launch_error(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A grid has at most 2^31 - 1 blocks, and each chunk of each row one of them: enough for 3.5e13
// elements.
template <class Kernel, class Arguments>
const char* launch(Kernel kernel, int64_t blocks, void* stream, const Arguments& arguments) {
  if (blocks > INT32_MAX) return "the tensors are too large for one launch";
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return launch_error(cudaLaunchKernelEx(&config, kernel, arguments));
}

}  // namespace memdlm
