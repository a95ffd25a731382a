// Hopper: products by wgmma, weights by bulk copies that a producer warp multicasts over a cluster of two blocks.
//
//   block     warpgroup 0 loads weights; warpgroups 1 ... kGroups have 64 rows each
//   ring      kStages items of weights. If all items of a call fit, each is loaded once and stays; otherwise the items go
//             round, each block fetching a half of an item for both, so that an item serves 2 * kGroups * 64 rows
#pragma once
#include <cuda_runtime.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include "forward.cuh"

namespace score {

template <class C>
struct Sm90 {
  static constexpr int kArch = 90, kGroups = 2, kCluster = 2, kThreads = 128 * (kGroups + 1);
  // Shares of 168 registers for each of 384 threads, which is what the launch allocates.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kMaximum = 227 << 10, kAlignment = 1024, kBarriers = 1024;
  static constexpr int kItemBytes = 2 * C::kItem;
  static constexpr int kFit = (kMaximum - kAlignment - kBarriers) / kItemBytes, kStages = kFit < 32 ? kFit : 32;
  static constexpr int kSharedBytes = kAlignment + kStages * kItemBytes + kBarriers;
  static_assert(kStages >= 3);                                     // two items are in use at a time

  static int launch(Forward const&, int multiprocessors, CUstream_st*);      // a cudaError_t

  using Element = cute::conditional_t<C::Number::dtype == Dtype::float16, cutlass::half_t, cutlass::bfloat16_t>;
  // Of each item in the ring: its bytes have come; all warps that read it, of both blocks, are done with it.
  struct Barriers {
    cutlass::arch::ClusterTransactionBarrier full[kStages];
    cutlass::arch::ClusterBarrier empty[kStages];
  };
  static_assert(sizeof(Barriers) <= kBarriers);

  // A place in the ring, and the parity of its round.
  struct Place {
    int slot = 0;
    unsigned parity = 0;
    __device__ void advance() {
      if (++slot == kStages) slot = 0, parity ^= 1;
    }
  };

  // The consumers' end of the ring.
  struct Weights {
    Barriers& barriers;
    Element const* ring;
    bool resident;
    int chunks, lane;
    Place next{};
    int held = 0;                                                  // the slot to release next

    __device__ int acquire(int set, int chunk) {
      Place const place = resident ? Place{set * chunks + chunk, 0} : next;
      barriers.full[place.slot].wait(place.parity);
      if (!resident) next.advance();
      return place.slot;
    }
    __device__ void release() {                                    // one lane of a warp tells each block of the cluster
      if (resident) return;
      barriers.empty[held].arrive(lane, lane < kCluster);
      held = held + 1 < kStages ? held + 1 : 0;
    }
    __device__ Element const* at(int slot) const { return ring + slot * C::kItem; }
  };

  int thread;                                                      // of the group

  __device__ float quad_sum(float v) const {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  }

  template <int N>
  __device__ void landed(float (&accumulator)[N]) const {          // nothing that reads it moves to before the wait
    CUTE_UNROLL
    for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(accumulator[i]);
  }
  template <int N>
  __device__ void begin(float (&accumulator)[N]) const {
    landed(accumulator);
    cute::warpgroup_arrive();
  }
  __device__ void commit() const { cute::warpgroup_commit_batch(); }
  template <int PENDING>
  __device__ void wait() const { cute::warpgroup_wait<PENDING>(); }

  // accumulator += A B^T: A is 64 x K, B is N x K at `b`, K contiguous and swizzled as in weights.cuh.
  template <int K, int HALF, int WORDS>
  __device__ void multiply(float (&accumulator)[HALF], std::uint32_t const (&a)[WORDS], Element const* b) const {
    using namespace cute;
    static_assert(WORDS == K / 4 && K % 64 == 0);
    constexpr int N = 2 * HALF;
    auto mma = make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<N>, Int<K>>, GMMA::Major::K,
                                                   GMMA::Major::K>());
    auto slice = mma.get_slice(thread);
    auto tile = make_tensor(make_smem_ptr(const_cast<Element*>(b)),
                            tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<Int<N>, Int<K>>{}));
    auto left = make_tensor(reinterpret_cast<Element const*>(a), Layout<Shape<Shape<_2, _2, _2>, _1, Int<K / 16>>>{});
    auto right = slice.make_fragment_B(slice.partition_B(tile));
    auto c = make_tensor(&accumulator[0], Layout<Shape<Shape<_2, _2, Int<N / 8>>, _1, _1>>{});
    CUTE_UNROLL
    for (int k = 0; k < K / 16; ++k) gemm(mma, left(_, _, k), right(_, _, k), c);
  }
};

// A half of an item, to both blocks of the cluster; each block's barrier counts the bytes that arrive in its own memory.
__device__ __forceinline__ void multicast(void* to, void const* from, int bytes, void const* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
      :
      : "r"(cute::cast_smem_ptr_to_uint(to)), "l"(from), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(barrier)),
        "h"(static_cast<std::uint16_t>(3))
      : "memory");
}

template <class C>
__global__ __cluster_dims__(Sm90<C>::kCluster, 1, 1) __launch_bounds__(Sm90<C>::kThreads, 1)
void forward_sm90(__grid_constant__ Forward const p) {
  using Arch = Sm90<C>;
  using Element = typename Arch::Element;
  extern __shared__ char raw[];
  char* base = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(raw) + Arch::kAlignment - 1) &
                                       ~std::uintptr_t(Arch::kAlignment - 1));
  Element* ring = reinterpret_cast<Element*>(base);
  auto& barriers = *reinterpret_cast<typename Arch::Barriers*>(base + Arch::kStages * Arch::kItemBytes);
  int const warpgroup = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Arch::kStages; ++slot) {
      barriers.full[slot].init(1);                                 // the producer's arrival, and the bytes that it announces
      barriers.empty[slot].init(4 * Arch::kGroups * Arch::kCluster);
    }
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();                                            // the barriers are there, for both blocks

  Images const images(C::kOp, C::kColumns, p.hidden, C::kChunk, C::kGated);
  bool const resident = p.sets * images.chunks <= Arch::kStages;
  int const rank = static_cast<int>(cute::block_rank_in_cluster());
  // Both blocks of a cluster go through the same number of tiles, rows or not, for they load for each other.
  constexpr int rows = 64 * Arch::kGroups * Arch::kCluster;
  auto const first = [] { return static_cast<int>(blockIdx.x / Arch::kCluster); };
  auto const step = [] { return static_cast<int>(gridDim.x / Arch::kCluster); };

  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Arch::kProducerRegisters>();
    if (thread < 32 && cute::elect_one_sync()) {
      typename Arch::Place place;
      auto load = [&](int set, int chunk) {
        constexpr int half = Arch::kItemBytes / Arch::kCluster;
        barriers.empty[place.slot].wait(place.parity ^ 1);         // passes in the first round
        barriers.full[place.slot].arrive_and_expect_tx(Arch::kItemBytes);
        multicast(base + place.slot * Arch::kItemBytes + rank * half,
                  images.items(p.packed, set) + std::size_t(chunk) * Arch::kItemBytes + rank * half, half,
                  &barriers.full[place.slot]);
        place.advance();
      };
      auto load_set = [&](int set) {
        CUTE_NO_UNROLL
        for (int chunk = 0; chunk < images.chunks; ++chunk) load(set, chunk);
      };
      if (resident) {
        CUTE_NO_UNROLL
        for (int set = 0; set < p.sets; ++set) load_set(set);
      } else {
        CUTE_NO_UNROLL
        for (int tile = first(); std::int64_t(tile) * rows < p.rows; tile += step())
          CUTE_NO_UNROLL
          for (int t = 0; t < p.iterations; ++t) load_set(set_of(p, t));
      }
    }
    __syncwarp();
    cute::cluster_sync();                                          // no block leaves while the other may still write to it
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<Arch::kConsumerRegisters>();
  int const group = warpgroup - 1;
  Arch arch{thread};
  typename Arch::Weights weights{barriers, ring, resident, images.chunks, thread % 32};
  CUTE_NO_UNROLL
  for (int tile = first(); std::int64_t(tile) * rows < p.rows; tile += step())
    Iterate<C>::run(p, arch, weights, std::int64_t(tile) * rows + (rank * Arch::kGroups + group) * 64, thread);
  cute::cluster_sync();
}

template <class C>
int Sm90<C>::launch(Forward const& p, int multiprocessors, CUstream_st* stream) {
  auto const kernel = forward_sm90<C>;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) return error;
  std::int64_t const cluster = 64 * kGroups * kCluster, clusters = (p.rows + cluster - 1) / cluster;
  int const most = multiprocessors / kCluster;
  unsigned const blocks = static_cast<unsigned>(clusters < most ? clusters : most) * kCluster;
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace score
