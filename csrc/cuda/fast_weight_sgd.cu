// Clipped SGD of all fast weights in two launches: no zeroed memory, no atomics, no wait.
//
// The clip needs each segment's norm before the first update, and a non-finite gradient anywhere
// must stop the whole row. So one launch sums squares and the next one updates; between them lies a
// table of doubles with a slot for each pair of a chunk and a segment that meet, slot chunk +
// segment of the row's (see Chunk: no slot is left over, so none needs to be zeroed). A segment's
// slots are adjacent, and its norm is one short sum. Every sum has an order fixed by the segment
// table alone: the same bits each time, and in whichever row of whichever batch.
//
// Bytes for each element, of param's p and the gradient's g: g, then g + 2p. A gradient larger than
// the L2 cache comes from memory twice, but for its tail: the second launch starts where the first
// one ended.
//
// Arithmetic is in double: no square of a float overflows there or vanishes, and a huge gradient's
// clip factor is no float. By count, where doubles run at half the float rate (sm_80, sm_90,
// sm_100) the memory is still the limit; where at a 64th (sm_86, sm_89, sm_120), 16-bit gradients
// wait.
#include "fast_weight.cuh"

namespace memdlm {
namespace {

// Half of a processor's threads, with 64 registers each.
constexpr int kBlocksPerProcessor = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// A butterfly gives every lane the same bits.
__device__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

__device__ double block_sum(double value) {
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

// This thread's part of a piece. Which elements that is does not depend on their address.
template <class G>
__device__ double sum_of_squares(const G* grad, int length, Team team) {
  constexpr int kPack = kLoad / sizeof(G);
  constexpr int kUnroll = kPack == 8 ? 2 : 4;  // all that 64 registers hold
  const bool aligned = is_aligned<G, kPack>(grad);
  const int packs = length / kPack;
  double sums[4] = {};  // chains, to hide the latency of the addition
#pragma unroll 1
  for (int i = team.rank; i < packs; i += kUnroll * team.size) {
    Pack<G, kPack> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * team.size;
      if (at >= packs) {
        pack[u] = {};
      } else if (aligned) {
        pack[u] = load<kPack, false>(grad + at * kPack);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) pack[u].value[e] = grad[at * kPack + e];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const double value = widen(pack[u].value[e]);
        sums[e % 4] = fma(value, value, sums[e % 4]);
      }
    }
  }
  const int tail = packs * kPack + team.rank;
  if (tail < length) {
    const double value = widen(grad[tail]);
    sums[0] = fma(value, value, sums[0]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Both tables of the scratch buffer: a row's slots, and the first segment of each chunk, which the
// second launch would otherwise search for again.
__device__ int64_t slot_count(const FastWeightSgd& step) {
  return chunk_count(step.columns) + step.count;
}

__device__ double* slots_of(const FastWeightSgd& step, int row) {
  return step.scratch + int64_t{row} * slot_count(step);
}

__device__ int* first_segments(const FastWeightSgd& step) {
  return reinterpret_cast<int*>(slots_of(step, step.rows));
}

template <class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    square_kernel(const FastWeightSgd step) {
  const int chunks = static_cast<int>(chunk_count(step.columns));
  const int row = static_cast<int>(blockIdx.x) / chunks;
  const Chunk chunk =
      find_chunk(static_cast<int>(blockIdx.x) % chunks, step.segments, step.columns, step.count);
  if (row == 0 && threadIdx.x == 0) {
    first_segments(step)[chunk.index] = chunk.first;
    first_segments(step)[chunk.index + 1] = chunk.last;
  }
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride;
  double* slots = slots_of(step, row) + chunk.index;
  for_each_piece(chunk, step.segments, step.count, step.columns,
                 [&](const Piece& piece, Team team) {
                   double sum = sum_of_squares(grad + piece.begin, piece.length, team);
                   sum = team.is_block() ? block_sum(sum) : warp_sum(sum);
                   if (team.rank == 0) slots[piece.segment] = sum;
                 });
}

// The square of a segment's norm; a warp asks. Always in this order, so that all blocks agree on
// the last bit.
__device__ double segment_square(const FastWeightSgd& step, const double* slots, int segment) {
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

__device__ bool is_loss_finite(const FastWeightSgd& step, int row) {
  bool finite = true;
  if (step.loss.data == nullptr) return finite;
  with_type(step.loss.dtype, [&](auto type) {
    using L = typename decltype(type)::type;
    finite = isfinite(widen(static_cast<const L*>(step.loss.data)[row * step.loss.stride]));
  });
  return finite;
}

__device__ double clipped(double lr, double max_norm, double norm) {
  return norm > max_norm ? lr * (max_norm / norm) : lr;
}

// What holds for a whole row.
struct Row {
  double factor;  // where no segment has its own
  bool skip;
};

// `N` is the norm's type.
template <class N>
__device__ Row read_row(const FastWeightSgd& step, const double* slots, int row) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < slot_count(step); i += kThreads) sum += __ldg(slots + i);
  const double total = block_sum(sum);
  bool bad = false;
  // No segment is larger than its row. A NaN compares false.
  const double safe = std::is_same_v<N, double> ? 1.7976931348623157e308 : 0x1p254;
  if (!(total < safe)) {
    for (int segment = threadIdx.x / kWarp; segment < step.count; segment += kWarps) {
      bad |= !isfinite(static_cast<N>(sqrt(segment_square(step, slots, segment))));
    }
  }
  bad = __syncthreads_or(bad) || !is_loss_finite(step, row);
  return {step.clip == Clip::kGlobal ? clipped(step.lr, step.max_norm, sqrt(total)) : step.lr, bad};
}

// Updates `count` packs of N elements from `column` of a row on.
template <int N, class P, class G>
__device__ void descend(const FastWeightSgd& step, int row, int64_t column, int count,
                        double factor, Team team) {
  constexpr int kWidest = N * (sizeof(P) > sizeof(G) ? sizeof(P) : sizeof(G));
  // 16 or 32 bytes of each tensor in flight for each of 1,024 threads: at least 32 KiB a processor,
  // where an H100 moves some 20 KiB in the latency of its memory. Eight elements and their doubles
  // are all that the registers hold.
  constexpr int kUnroll = N == 1 || N == 8 ? 1 : 32 / kWidest;
  P* param = static_cast<P*>(step.param.data) + row * step.param.stride + column;
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride + column;
#pragma unroll 1
  for (int i = team.rank; i < count; i += kUnroll * team.size) {
    Pack<P, N> param_pack[kUnroll];
    Pack<G, N> grad_pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * team.size;
      if (at >= count) continue;
      grad_pack[u] = load<N, true>(grad + at * N);
      param_pack[u] = load<N, true>(param + at * N);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * team.size;
      if (at >= count) continue;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const double before = widen(param_pack[u].value[e]);
        const double slope = widen(grad_pack[u].value[e]);
        param_pack[u].value[e] = narrow<P>(fma(-factor, slope, before));
      }
      store<N>(param + at * N, param_pack[u]);
      store_cast<N>(step.cast, row, column + at * N, param_pack[u]);
    }
  }
}

// What an updating thread knows and seldom needs. In shared memory, its own part of it, since its
// registers are for loads in flight.
struct Known {
  Row row;
  double norm, factor;  // of `segment`
  int row_index, segment;
};

template <class P, class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    update_kernel(const FastWeightSgd step) {
  using N = std::conditional_t<std::is_same_v<G, double>, double, float>;
  constexpr int kNarrow = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  constexpr int kWide = sizeof(P) < sizeof(G) ? sizeof(G) : sizeof(P);
  // 16 bytes of the narrower tensor, if that is no more than 32 of the other.
  constexpr int kPack = kWide <= 2 * kNarrow ? kLoad / kNarrow : 2 * kLoad / kWide;
  const int chunks = static_cast<int>(chunk_count(step.columns));
  __shared__ Known all_known[kThreads];
  Known& known = all_known[threadIdx.x];
  known.row_index = -1;
  const int blocks = static_cast<int>(gridDim.x);
  for (int item = step.rows * chunks - 1 - static_cast<int>(blockIdx.x); item >= 0;
       item -= blocks) {
    const int row = item / chunks, index = item % chunks;
    if (row != known.row_index) {
      known.row = read_row<N>(step, slots_of(step, row), row);
      known.row_index = row;
      known.segment = -1;
    }
    if (index == 0 && threadIdx.x == 0) step.skipped[row] = known.row.skip;
    const int* first = first_segments(step) + index;
    const Chunk chunk{index, __ldg(first), __ldg(first + 1)};
    for_each_piece(
        chunk, step.segments, step.count, step.columns, [&](const Piece& piece, Team team) {
          if (piece.length == 0 && !piece.owned) return;
          // Each warp sums for itself, which needs no barrier; a long segment's norm serves for all
          // its chunks.
          if (piece.segment != known.segment) {
            known.segment = piece.segment;
            known.norm = sqrt(segment_square(step, slots_of(step, row), piece.segment));
            known.factor = step.clip == Clip::kTensor ? clipped(step.lr, step.max_norm, known.norm)
                                                      : known.row.factor;
          }
          if (piece.owned && team.rank == 0) {
            static_cast<N*>(step.norm)[int64_t{row} * step.count + piece.segment] =
                static_cast<N>(known.norm);
          }
          if (known.row.skip) return;
          const double factor = known.factor;

          const P* param =
              static_cast<const P*>(step.param.data) + row * step.param.stride + piece.begin;
          const G* grad =
              static_cast<const G*>(step.grad.data) + row * step.grad.stride + piece.begin;
          const bool aligned = is_aligned<P, kPack>(param) && is_aligned<G, kPack>(grad) &&
                               is_cast_aligned<kPack>(step.cast, row, piece.begin);
          const int packs = aligned ? piece.length / kPack : 0;
          descend<kPack, P, G>(step, row, piece.begin, packs, factor, team);
          descend<1, P, G>(step, row, piece.begin + packs * kPack, piece.length - packs * kPack,
                           factor, team);
        });
  }
}

// Read once: the answer never changes, and the question is not free.
int processor_count() {
  constexpr int kDevices = 64;
  static int known[kDevices] = {};  // a race writes the same number twice
  int device = 0, count = 0;
  cudaGetDevice(&device);
  if (device < kDevices && known[device] > 0) return known[device];
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (device < kDevices) known[device] = count;
  return count > 0 ? count : 1;
}

}  // namespace

int64_t fast_weight_sgd_scratch(int rows, int64_t columns, int count) {
  const int64_t chunks = chunk_count(columns);
  return rows * (chunks + count) + chunks + 1;
}

const char* launch_fast_weight_sgd(const FastWeightSgd& step, void* stream) {
  if (step.rows == 0) return nullptr;
  const int64_t blocks = step.rows * chunk_count(step.columns);
  const int64_t resident = static_cast<int64_t>(kBlocksPerProcessor) * processor_count();
  const char* error = nullptr;
  with_type(step.grad.dtype, [&](auto grad) {
    using G = typename decltype(grad)::type;
    error = launch(square_kernel<G>, blocks, stream, step);
    if (error != nullptr) return;
    with_type(step.param.dtype, [&](auto param) {
      using P = typename decltype(param)::type;
      error = launch(update_kernel<P, G>, blocks < resident ? blocks : resident, stream, step);
    });
  });
  return error;
}

}  // namespace memdlm
