// All fast weights drawn afresh in one launch: one pass of writes, nothing read but the tables.
//
// Philox makes four words from a counter, and the counter is the column's: so any thread can draw
// any column, and the numbers depend neither on the grid nor on the device. Half of all fast
// weights (every B) have the bound 0 and are written without drawing; the other half costs 20
// integer instructions for each element, less time than its 2 or 4 bytes take to write.
#include "fast_weight.cuh"

namespace memdlm {
namespace {

// Four words of Philox4x32-10, counter (counter, 0, 0, 0).
__device__ void philox(uint32_t counter, uint64_t seed, uint32_t (&word)[4]) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

template <class P>
__device__ Work<P> bound_of(const FastWeightReset& reset, int segment) {
  if (reset.bounds.dtype == Dtype::kFloat64) {
    return static_cast<Work<P>>(__ldg(static_cast<const double*>(reset.bounds.data) + segment));
  }
  return __ldg(static_cast<const float*>(reset.bounds.data) + segment);
}

template <int N, class P>
__device__ Pack<P, N> draw(int64_t column, uint64_t seed, Work<P> bound) {
  Pack<P, N> pack;
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    uint32_t word[4];
    philox(static_cast<uint32_t>((column + i) / 4), seed, word);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // (word >> 8) / 2^24 * 2 - 1, exact in float: the product with the bound is all the rounding.
      const int centred = static_cast<int>(word[j] >> 8) - (1 << 23);
      pack.value[i + j] = narrow<P>(static_cast<Work<P>>(centred) * Work<P>(0x1p-23) * bound);
    }
  }
  return pack;
}

template <class P>
__global__ void __launch_bounds__(kThreads) reset_kernel(const FastWeightReset reset) {
  // A counter's four columns, or two counters' where one store holds them.
  constexpr int kPack = sizeof(P) == 2 ? 8 : 4;
  const int chunks = static_cast<int>(chunk_count(reset.columns));
  const int row = static_cast<int>(blockIdx.x) / chunks;
  const Chunk chunk =
      find_chunk(static_cast<int>(blockIdx.x) % chunks, reset.segments, reset.columns, reset.count);
  P* param = static_cast<P*>(reset.param.data) + row * reset.param.stride;
  const bool aligned =
      is_aligned<P, kPack>(param) && is_cast_aligned<kPack>(reset.cast, row, int64_t{0});
  const uint64_t seed = static_cast<uint64_t>(__ldg(reset.seed + row));
  for_each_piece(chunk, reset.segments, reset.count, reset.columns,
                 [&](const Piece& piece, Team team) {
                   if (piece.length == 0) return;
                   const Work<P> bound = bound_of<P>(reset, piece.segment);
                   const int64_t begin = piece.begin, end = begin + piece.length;
    // A segment may begin and end within a pack: both neighbours draw it and write their part.
#pragma unroll 1
                   for (int64_t column = (begin / kPack + team.rank) * kPack; column < end;
                        column += kPack * team.size) {
                     Pack<P, kPack> pack{};
                     if (bound > 0) pack = draw<kPack, P>(column, seed, bound);
                     if (aligned && column >= begin && column + kPack <= end) {
                       store<kPack>(param + column, pack);
                       store_cast<kPack>(reset.cast, row, column, pack);
                     } else {
#pragma unroll
                       for (int i = 0; i < kPack; ++i) {
                         if (column + i < begin || column + i >= end) continue;
                         param[column + i] = pack.value[i];
                         store_cast<1>(reset.cast, row, column + i, Pack<P, 1>{pack.value[i]});
                       }
                     }
                   }
                 });
}

}  // namespace

const char* launch_fast_weight_reset(const FastWeightReset& reset, void* stream) {
  if (reset.rows == 0) return nullptr;
  const char* error = nullptr;
  with_type(reset.param.dtype, [&](auto param) {
    using P = typename decltype(param)::type;
    error = launch(reset_kernel<P>, reset.rows * chunk_count(reset.columns), stream, reset);
  });
  return error;
}

}  // namespace memdlm
