// The derivative of clipped SGD by the gradient, for all fast weights in two launches.
//
// A segment g that was clipped became lr * max_norm * g / |g|, which no change of g along g itself
// moves. So what comes from above loses its part along g: the first launch sums g's squares, as the
// step did, and its products with what comes from above; the second one subtracts and scales (see
// fast_weight_sgd.cuh). The step's norms are not asked for: summing squares beside products costs
// no byte, and a norm in float32 would leave 1e-7 of the part along g.
//
// Bytes for each element, of the gradient's g and what comes from above, u: g + u, then 2g + u;
// without a clip the first launch reads nothing of them.
#include "fast_weight_sgd.cuh"

namespace memdlm {
namespace {

template <class G, class U>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    product_kernel(const FastWeightSgdBackward step) {
  const int row = row_of_block(step);
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride;
  const U* grad_updated =
      static_cast<const U*>(step.grad_updated.data) + row * step.grad_updated.stride;
  sum_chunk(step, row, [&](int i, const Piece& piece, Team team) {
    const int length = step.clip == Clip::kNone ? 0 : piece.length;
    const G* part = grad + piece.begin;
    if (i == 0) return sum_of_products<true, sizeof(G) == 2 ? 1 : 2>(part, part, length, team);
    return sum_of_products<false, 1>(part, grad_updated + piece.begin, length, team);
  });
}

// grad_grad = -factor * (grad_updated - along * grad)
struct Slope {
  double factor, along;
};

__device__ Slope slope_of(const FastWeightSgdBackward& step, double square, double product) {
  const double norm = sqrt(square);
  return {clipped(step.lr, step.max_norm, norm), norm > step.max_norm ? product / square : 0};
}

// What a writing thread knows; as the step's, in shared memory.
struct KnownSlope {
  Slope slope;  // of `segment`, or with a global clip of `row`
  int row, segment;
  bool skip;
};

// Writes `count` packs of N elements from `column` of a row on.
template <int N, class G, class U>
__device__ void project(const FastWeightSgdBackward& step, int row, int64_t column, int count,
                        const KnownSlope& known, Team team) {
  const G* grad = static_cast<const G*>(step.grad.data) + row * step.grad.stride + column;
  const U* grad_updated =
      static_cast<const U*>(step.grad_updated.data) + row * step.grad_updated.stride + column;
  G* grad_grad = static_cast<G*>(step.grad_grad.data) + row * step.grad_grad.stride + column;
  for_each_pack<N>(grad, grad_updated, count, team,
                   [&](int at, Pack<G, N>& pack, const Pack<U, N>& above) {
#pragma unroll
                     for (int e = 0; e < N; ++e) {
                       const double along = widen(pack.value[e]), whole = widen(above.value[e]);
                       const double across = fma(-known.slope.along, along, whole);
                       // Not by a factor of zero: a skipped gradient may hold a NaN.
                       pack.value[e] = narrow<G>(known.skip ? 0.0 : -known.slope.factor * across);
                     }
                     store<N>(grad_grad + at, pack);
                   });
}

template <class G, class U>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    project_kernel(const FastWeightSgdBackward step) {
  constexpr int kPack = kPackOf<G, U>;
  __shared__ KnownSlope all_known[kThreads];
  KnownSlope& known = all_known[threadIdx.x];
  known.row = -1;
  for_each_chunk(step, [&](int row, const Chunk& chunk) {
    if (row != known.row) {
      known.row = row;
      known.segment = -1;
      known.slope = step.clip == Clip::kGlobal
                        ? slope_of(step, row_sum(step, slots_of(step, row, 0)),
                                   row_sum(step, slots_of(step, row, 1)))
                        : Slope{step.lr, 0};
      known.skip = step.skipped[row];
    }
    for_each_piece(
        chunk, step.segments, step.count, step.columns, [&](const Piece& piece, Team team) {
          if (piece.length == 0) return;
          if (step.clip == Clip::kTensor && piece.segment != known.segment) {
            known.segment = piece.segment;
            known.slope = slope_of(step, segment_sum(step, slots_of(step, row, 0), piece.segment),
                                   segment_sum(step, slots_of(step, row, 1), piece.segment));
          }
          const G* grad =
              static_cast<const G*>(step.grad.data) + row * step.grad.stride + piece.begin;
          const U* grad_updated = static_cast<const U*>(step.grad_updated.data) +
                                  row * step.grad_updated.stride + piece.begin;
          const G* grad_grad = static_cast<const G*>(step.grad_grad.data) +
                               row * step.grad_grad.stride + piece.begin;
          const bool aligned = is_aligned<G, kPack>(grad) && is_aligned<U, kPack>(grad_updated) &&
                               is_aligned<G, kPack>(grad_grad);
          const int packs = aligned ? piece.length / kPack : 0;
          project<kPack, G, U>(step, row, piece.begin, packs, known, team);
          project<1, G, U>(step, row, piece.begin + packs * kPack, piece.length - packs * kPack,
                           known, team);
        });
  });
}

}  // namespace

int64_t fast_weight_sgd_backward_scratch(int rows, int64_t columns, int count) {
  return scratch_of<FastWeightSgdBackward>(rows, columns, count);
}

const char* launch_fast_weight_sgd_backward(const FastWeightSgdBackward& step, void* stream) {
  if (step.rows == 0) return nullptr;
  const char* error = nullptr;
  with_type(step.grad.dtype, [&](auto grad) {
    using G = typename decltype(grad)::type;
    with_type(step.grad_updated.dtype, [&](auto grad_updated) {
      using U = typename decltype(grad_updated)::type;
      error = launch_both(product_kernel<G, U>, project_kernel<G, U>, step, stream);
    });
  });
  return error;
}

}  // namespace memdlm
