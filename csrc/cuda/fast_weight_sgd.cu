// Clipped SGD of all fast weights in two launches: no zeroed memory, no atomics, no wait.
//
// The clip needs each segment's norm before the first update, and a non-finite gradient anywhere
// must stop the whole row: so the first launch sums squares and the second one updates (see
// fast_weight_sgd.cuh).
//
// Bytes for each element, of param's p and the gradient's g: g, then g + 2p. A gradient larger than
// the L2 cache comes from memory twice, but for its tail: the second launch starts where the first
// one ended.
//
// Arithmetic is in double: no square of a float overflows there or vanishes, and a huge gradient's
// clip factor is no float. By count, where doubles run at half the float rate (sm_80, sm_90,
// sm_100) the memory is still the limit; where at a 64th (sm_86, sm_89, sm_120), 16-bit gradients
// wait.
#include "fast_weight_sgd.cuh"

namespace memdlm {
namespace {

template <class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    square_kernel(const FastWeightSgd step) {
  const int row = row_of_block(step);
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride;
  sum_chunk(step, row, [&](int, const Piece& piece, Team team) {
    return sum_of_products<true, sizeof(G) == 2 ? 2 : 4>(grad + piece.begin, grad, piece.length,
                                                         team);
  });
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

// What holds for a whole row.
struct Row {
  double factor;  // where no segment has its own
  bool skip;
};

// `N` is the norm's type.
template <class N>
__device__ Row read_row(const FastWeightSgd& step, const double* slots, int row) {
  const double total = row_sum(step, slots);
  bool bad = false;
  // No segment is larger than its row. A NaN compares false.
  const double safe = std::is_same_v<N, double> ? 1.7976931348623157e308 : 0x1p254;
  if (!(total < safe)) {
    for (int segment = threadIdx.x / kWarp; segment < step.count; segment += kWarps) {
      bad |= !isfinite(static_cast<N>(sqrt(segment_sum(step, slots, segment))));
    }
  }
  bad = __syncthreads_or(bad) || !is_loss_finite(step, row);
  return {step.clip == Clip::kGlobal ? clipped(step.lr, step.max_norm, sqrt(total)) : step.lr, bad};
}

// Updates `count` packs of N elements from `column` of a row on.
template <int N, class P, class G>
__device__ void descend(const FastWeightSgd& step, int row, int64_t column, int count,
                        double factor, Team team) {
  P* param = static_cast<P*>(step.param.data) + row * step.param.stride + column;
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride + column;
  for_each_pack<N>(param, grad, count, team,
                   [&](int at, Pack<P, N>& param_pack, const Pack<G, N>& grad_pack) {
#pragma unroll
                     for (int e = 0; e < N; ++e) {
                       const double before = widen(param_pack.value[e]);
                       const double slope = widen(grad_pack.value[e]);
                       param_pack.value[e] = narrow<P>(fma(-factor, slope, before));
                     }
                     store<N>(param + at, param_pack);
                     store_cast<N>(step.cast, row, column + at, param_pack);
                   });
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
  constexpr int kPack = kPackOf<P, G>;
  __shared__ Known all_known[kThreads];
  Known& known = all_known[threadIdx.x];
  known.row_index = -1;
  for_each_chunk(step, [&](int row, const Chunk& chunk) {
    if (row != known.row_index) {
      known.row = read_row<N>(step, slots_of(step, row), row);
      known.row_index = row;
      known.segment = -1;
    }
    if (chunk.index == 0 && threadIdx.x == 0) step.skipped[row] = known.row.skip;
    for_each_piece(
        chunk, step.segments, step.count, step.columns, [&](const Piece& piece, Team team) {
          if (piece.length == 0 && !piece.owned) return;
          // Each warp sums for itself, which needs no barrier; a long segment's norm serves for all
          // its chunks.
          if (piece.segment != known.segment) {
            known.segment = piece.segment;
            known.norm = sqrt(segment_sum(step, slots_of(step, row), piece.segment));
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
  });
}

}  // namespace

int64_t fast_weight_sgd_scratch(int rows, int64_t columns, int count) {
  return scratch_of<FastWeightSgd>(rows, columns, count);
}

const char* launch_fast_weight_sgd(const FastWeightSgd& step, void* stream) {
  if (step.rows == 0) return nullptr;
  const char* error = nullptr;
  with_type(step.grad.dtype, [&](auto grad) {
    using G = typename decltype(grad)::type;
    with_type(step.param.dtype, [&](auto param) {
      using P = typename decltype(param)::type;
      error = launch_both(square_kernel<G>, update_kernel<P, G>, step, stream);
    });
  });
  return error;
}

}  // namespace memdlm
