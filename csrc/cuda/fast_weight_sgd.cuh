// What the step and its derivative share: sums over segments, and the loops around them.
//
// Both need a segment's sums before they write its first element. So one launch sums and the next
// one writes; between them lies a table of doubles with a slot for each pair of a chunk and a
// segment that meet, slot chunk + segment of the row's (see Chunk: no slot is left over, so none
// needs to be zeroed). A segment's slots are adjacent, and its sum is one short sum. Every sum has
// an order fixed by the segment table alone: the same bits each time, and in whichever row of
// whichever batch.
//
// A `Step` is what a launch is given (fast_weight.h); its kSums says how many sums a segment has.
#pragma once

#include "fast_weight.cuh"

namespace memdlm {

// Half of a processor's threads, with 64 registers each.
constexpr int kBlocksPerProcessor = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// A butterfly gives every lane the same bits.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

__device__ inline double block_sum(double value) {
  __shared__ double warps[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += warps[warp];
  __syncthreads();  // before the next call writes
  return total;
}

// N elements from any address, zeros beyond the end; where `aligned` they may be moved in words.
template <int N, class T>
__device__ inline Pack<T, N> load_from(const T* address, bool inside, bool aligned) {
  Pack<T, N> pack;
  if (!inside) {
    pack = {};
  } else if (aligned) {
    pack = load<N, false>(address);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) pack.value[e] = address[e];
  }
  return pack;
}

// This thread's part of a piece's sum: of the products of two tensors, or of the squares of `a`,
// and then `b` is not read. Which elements that is does not depend on their address, nor on how
// many loads are in flight: all that the 64 registers of a kernel hold.
template <bool kSquares, int kLoads, class A, class B>
__device__ inline double sum_of_products(const A* a, const B* b, int length, Team team) {
  constexpr int kPack = kLoad / (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
  const bool a_aligned = is_aligned<A, kPack>(a), b_aligned = is_aligned<B, kPack>(b);
  const int packs = length / kPack;
  double sums[4] = {};  // chains, to hide the latency of the addition
#pragma unroll 1
  for (int i = team.rank; i < packs; i += kLoads * team.size) {
    Pack<A, kPack> a_pack[kLoads];
    Pack<B, kPack> b_pack[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int at = i + u * team.size;
      const bool inside = at < packs;
      a_pack[u] = load_from<kPack>(a + at * kPack, inside, a_aligned);
      if (!kSquares) b_pack[u] = load_from<kPack>(b + at * kPack, inside, b_aligned);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const double value = widen(a_pack[u].value[e]);
        const double factor = kSquares ? value : widen(b_pack[u].value[e]);
        sums[e % 4] = fma(value, factor, sums[e % 4]);
      }
    }
  }
  const int tail = packs * kPack + team.rank;
  if (tail < length) {
    const double value = widen(a[tail]);
    const double factor = kSquares ? value : widen(b[tail]);
    sums[0] = fma(value, factor, sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The tables of the scratch buffer: a row's slots, once for each sum, and the first segment of each
// chunk, which the second launch would otherwise search for again.
template <class Step>
__device__ inline int64_t slot_count(const Step& step) {
  return chunk_count(step.columns) + step.count;
}

template <class Step>
__device__ inline int64_t table_size(const Step& step) {
  return step.rows * slot_count(step);
}

template <class Step>
__device__ inline double* slots_of(const Step& step, int row, int sum = 0) {
  return step.scratch + sum * table_size(step) + row * slot_count(step);
}

template <class Step>
__device__ inline int* first_segments(const Step& step) {
  return reinterpret_cast<int*>(slots_of(step, 0, Step::kSums));
}

template <class Step>
int64_t scratch_of(int rows, int64_t columns, int count) {
  const int64_t chunks = chunk_count(columns);
  return int64_t{Step::kSums} * rows * (chunks + count) + chunks + 1;
}

// The first launch has a block for each chunk of each row.
template <class Step>
__device__ inline int row_of_block(const Step& step) {
  return static_cast<int>(blockIdx.x) / static_cast<int>(chunk_count(step.columns));
}

// Writes its slots: sum_of_piece(i, piece, team) is this thread's part of the i-th sum of a piece.
template <class Step, class Body>
__device__ inline void sum_chunk(const Step& step, int row, Body sum_of_piece) {
  const int index = static_cast<int>(blockIdx.x) % static_cast<int>(chunk_count(step.columns));
  const Chunk chunk = find_chunk(index, step.segments, step.columns, step.count);
  if (row == 0 && threadIdx.x == 0) {
    first_segments(step)[index] = chunk.first;
    first_segments(step)[index + 1] = chunk.last;
  }
  double* slots = slots_of(step, row) + index;
  for_each_piece(chunk, step.segments, step.count, step.columns,
                 [&](const Piece& piece, Team team) {
#pragma unroll 1
                   for (int i = 0; i < Step::kSums; ++i) {
                     double sum = sum_of_piece(i, piece, team);
                     sum = team.is_block() ? block_sum(sum) : warp_sum(sum);
                     if (team.rank == 0) slots[i * table_size(step) + piece.segment] = sum;
                   }
                 });
}

// The second launch, of as many blocks as fit: calls body(row, chunk) for this block's share. Last
// chunks first: of a tensor larger than the L2 cache those are still in there.
template <class Step, class Body>
__device__ inline void for_each_chunk(const Step& step, Body body) {
  const int chunks = static_cast<int>(chunk_count(step.columns));
  const int blocks = static_cast<int>(gridDim.x);
  for (int item = step.rows * chunks - 1 - static_cast<int>(blockIdx.x); item >= 0;
       item -= blocks) {
    const int index = item % chunks;
    const int* first = first_segments(step) + index;
    body(item / chunks, Chunk{index, __ldg(first), __ldg(first + 1)});
  }
}

// A sum of a whole segment; a warp asks. Always in this order, so that all blocks agree on the last
// bit.
template <class Step>
__device__ inline double segment_sum(const Step& step, const double* slots, int segment) {
  const int64_t begin = __ldg(step.segments + segment), end = __ldg(step.segments + segment + 1);
  if (begin == end) return 0;
  const int first = static_cast<int>(begin / kChunk);
  const int count = static_cast<int>((end - 1) / kChunk) - first + 1;
  slots += first + segment;
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) sum += __ldg(slots + i);
  return warp_sum(sum);
}

// A sum of a whole row; a block asks.
template <class Step>
__device__ inline double row_sum(const Step& step, const double* slots) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < slot_count(step); i += kThreads) sum += __ldg(slots + i);
  return block_sum(sum);
}

__device__ inline double clipped(double lr, double max_norm, double norm) {
  return norm > max_norm ? lr * (max_norm / norm) : lr;
}

// Elements of two tensors that a thread moves at once: 16 bytes of the narrower tensor, if that is
// no more than 32 of the other.
template <class A, class B, int kNarrow = sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B),
          int kWide = sizeof(A) < sizeof(B) ? sizeof(B) : sizeof(A)>
constexpr int kPackOf = kWide <= 2 * kNarrow ? kLoad / kNarrow : 2 * kLoad / kWide;

// Calls body(column, pack of a, pack of b) for `count` packs of N columns, counted from the
// addresses given.
template <int N, class A, class B, class Body>
__device__ inline void for_each_pack(const A* a, const B* b, int count, Team team, Body body) {
  constexpr int kWidest = N * (sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
  // 16 or 32 bytes of each tensor in flight for each of 1,024 threads: at least 32 KiB a processor,
  // where an H100 moves some 20 KiB in the latency of its memory. Eight elements and their doubles
  // are all that the registers hold.
  constexpr int kUnroll = N == 1 || N == 8 ? 1 : 32 / kWidest;
#pragma unroll 1
  for (int i = team.rank; i < count; i += kUnroll * team.size) {
    Pack<A, N> a_pack[kUnroll];
    Pack<B, N> b_pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * team.size;
      if (at >= count) continue;
      b_pack[u] = load<N, true>(b + at * N);
      a_pack[u] = load<N, true>(a + at * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * team.size;
      if (at < count) body(at * N, a_pack[u], b_pack[u]);
    }
  }
}

// Read once: the answer never changes, and the question is not free.
inline int processor_count() {
  constexpr int kDevices = 64;
  static int known[kDevices] = {};  // a race writes the same number twice
  int device = 0, count = 0;
  cudaGetDevice(&device);
  if (device < kDevices && known[device] > 0) return known[device];
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (device < kDevices) known[device] = count;
  return count > 0 ? count : 1;
}

// Both launches; the second one's kernel runs on no more blocks than fit the device at once.
template <class Step>
const char* launch_both(void (*sums)(Step), void (*write)(Step), const Step& step, void* stream) {
  const int64_t blocks = step.rows * chunk_count(step.columns);
  const int64_t resident = static_cast<int64_t>(kBlocksPerProcessor) * processor_count();
  const char* error = launch(sums, blocks, stream, step);
  if (error != nullptr) return error;
  return launch(write, blocks < resident ? blocks : resident, stream, step);
}

}  // namespace memdlm
