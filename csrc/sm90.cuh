// Hopper: products by wgmma, weights by bulk copies that a producer warp multicasts over a cluster of two blocks.
//
//   block     warpgroup 0 loads weights, and where the block accumulates their gradients it and the next do that; each of the
//             others, kGroups, has 64 rows
//   ring      kStages items of weights. If all items of a call fit, each is loaded once and stays; otherwise the items go
//             round, each block fetching a half of an item for both, so that an item serves 2 * kGroups * 64 rows
//   own       what a group keeps there for itself: x, which is in registers up to D = 128; in the backward pass a float32 tile.
//             Where the block accumulates, two of float32 and five of 16 bits: those that it hands over, and x
#pragma once
#include <cuda_runtime.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/numeric_types.h>

#include <type_traits>

#include "gradients.cuh"

namespace score {

template <class C>
struct Sm90 {
  static constexpr bool kAccumulates = C::kAccumulates;
  static constexpr int kArch = 90, kGroups = kAccumulates && C::kColumns > 64 ? 1 : 2, kHelpers = kAccumulates ? 2 : 1;
  static constexpr int kCluster = 2, kThreads = 128 * (kGroups + kHelpers);
  // Shares of the 168 registers that the launch allocates for each of 384 threads, or 128 of 512.
  static constexpr int kHelperRegisters = !kAccumulates ? 40 : kGroups == 1 ? 160 : 72;
  static constexpr int kConsumerRegisters = kAccumulates ? 184 : 232;
  static constexpr int kMaximum = 227 << 10, kAlignment = 1024, kBarriers = 1024;
  static constexpr bool kBackward = std::is_same_v<typename C::Params, Backward>, kShared = C::kColumns > 128 || kAccumulates;
  using Operand = cute::conditional_t<kShared, SharedOperand<C>, RegisterOperand<C>>;
  static constexpr int kTile = 64 * C::kColumns;                   // numbers
  static constexpr int kOwn = kTile * (kAccumulates ? 18 : kBackward ? 4 : kShared ? 2 : 0);   // bytes of a group
  static constexpr int kItemBytes = 2 * C::kItem, kOthers = kAlignment + kGroups * kOwn + kBarriers;
  static constexpr int kFit = (kMaximum - kOthers) / kItemBytes, kMost = kAccumulates ? C::kColumns / C::kChunk : 32;
  static constexpr int kStages = kFit < kMost ? kFit : kMost;
  static constexpr int kSharedBytes = kOthers + kStages * kItemBytes;
  static_assert(kStages >= (kAccumulates ? kMost : 3));            // two items are in use at a time, if they do not all stay

  static int launch(typename C::Params const&, int multiprocessors, CUstream_st*);    // a cudaError_t

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

    __device__ int acquire(int set, int chunk) {
      Place const place = resident ? Place{set * chunks + chunk, 0} : next;
      barriers.full[place.slot].wait(place.parity);
      if (!resident) next.advance();
      return place.slot;
    }
    __device__ void release(int slot) const {                      // one lane of a warp tells each block of the cluster
      if (!resident) barriers.empty[slot].arrive(lane, lane < kCluster);
    }
    __device__ Element const* at(int slot) const { return ring + slot * C::kItem; }
  };

  char* own;                                                       // of all groups
  int group, thread;                                               // thread of the group

  // Where pair i of a fragment waits; no other thread has a part in it.
  __device__ float2& parked(int i) const { return reinterpret_cast<float2*>(own + group * kOwn)[i / 2 * 128 + thread]; }

  // A tile of 16 bits of a group, 64 x D or 64 x H.
  __device__ typename C::Element* tile(int of, int field) const {
    return reinterpret_cast<typename C::Element*>(own + of * kOwn + (kBackward ? 8 * kTile : 0)) + field * kTile;
  }
  __device__ typename C::Element* tile(int field) const { return tile(group, field); }
  // A group has written what is of a chunk of hidden features, and those who accumulate read it; they are done with all of an
  // iteration, and the group goes on to the next.
  static constexpr int kSharers = 128 * (1 + kHelpers), kNames = C::kColumns / C::kChunk + 1;
  __device__ void hand_over(int chunk) const {
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive(kSharers, group * kNames + chunk);
  }
  __device__ void receive(int group, int chunk) const { cutlass::arch::NamedBarrier::sync(kSharers, group * kNames + chunk); }
  __device__ void give_back(int group) const { cutlass::arch::NamedBarrier::arrive(kSharers, group * kNames + kNames - 1); }
  __device__ void reclaim() const { cutlass::arch::NamedBarrier::sync(kSharers, group * kNames + kNames - 1); }

  __device__ float quad_sum(float v) const {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  }

  __device__ Operand operand(int field) const {
    if constexpr (kShared)
      return {tile(field), thread};
    else
      return {};
  }
  template <class F>
  __device__ void rewrite(Operand&, F write) const {
    int const name = (kAccumulates ? kGroups * kNames : 0) + group;
    if constexpr (kShared) cutlass::arch::NamedBarrier::sync(128, name);       // all warps' products have read what is there
    write();
    if constexpr (kShared) {
      cutlass::arch::fence_view_async_shared();
      cutlass::arch::NamedBarrier::sync(128, name);
    }
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

  // An N x K operand in shared memory, K contiguous and swizzled as in weights.cuh; or, transposed, the same of K x N.
  template <int N, int K, bool TRANSPOSED = false, class T>
  static __device__ auto tile(T const* at) {
    using namespace cute;
    using Lines = conditional_t<(K >= 64), GMMA::Layout_K_SW128_Atom<Element>, GMMA::Layout_K_SW64_Atom<Element>>;
    using Columns = conditional_t<(N >= 64), GMMA::Layout_MN_SW128_Atom<Element>, GMMA::Layout_MN_SW64_Atom<Element>>;
    using Atom = conditional_t<TRANSPOSED, Columns, Lines>;
    using Order = conditional_t<TRANSPOSED, Step<_2, _1>, Step<_1, _2>>;
    return make_tensor(make_smem_ptr(reinterpret_cast<Element const*>(at)),
                       tile_to_shape(Atom{}, Shape<Int<N>, Int<K>>{}, Order{}));
  }

  // accumulator += A B^T: A is 64 x K, B is N x K at `b`, as `tile` has it.
  template <int K, bool TRANSPOSED = false, int HALF, int WORDS>
  __device__ void multiply(float (&accumulator)[HALF], std::uint32_t const (&a)[WORDS], Element const* b) const {
    using namespace cute;
    static_assert(WORDS == K / 4);
    using Tile = Shape<_64, Int<2 * HALF>, Int<K>>;
    constexpr auto major = TRANSPOSED ? GMMA::Major::MN : GMMA::Major::K;
    auto mma = make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Tile, GMMA::Major::K, major>());
    auto left = make_tensor(reinterpret_cast<Element const*>(a), Layout<Shape<Shape<_2, _2, _2>, _1, Int<K / 16>>>{});
    product<K, TRANSPOSED>(mma, left, accumulator, b);
  }
  template <int K, bool TRANSPOSED = false, int HALF>
  __device__ void multiply(float (&accumulator)[HALF], Operand const& x, Element const* b) const {
    using namespace cute;
    if constexpr (kShared) {
      constexpr auto major = TRANSPOSED ? GMMA::Major::MN : GMMA::Major::K;
      auto mma = make_tiled_mma(
          GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<2 * HALF>, Int<K>>, GMMA::Major::K, major>());
      auto slice = mma.get_slice(thread);
      auto* at = x.tile;
      forget(at);                                                  // or a descriptor for each k is kept through all iterations
      product<K, TRANSPOSED>(mma, slice.make_fragment_A(slice.partition_A(tile<64, K>(at))), accumulator, b);
    } else {
      multiply<K, TRANSPOSED>(accumulator, x.a, b);
    }
  }

  // accumulator += A B^T: A is 64 x 64 and B is N x 64, both in shared memory and as `tile` has them transposed.
  template <int HALF, class T>
  __device__ void multiply_transposed(float (&accumulator)[HALF], T const* a, T const* b) const {
    using namespace cute;
    auto mma = make_tiled_mma(
        GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<2 * HALF>, _64>, GMMA::Major::MN, GMMA::Major::MN>());
    auto slice = mma.get_slice(thread);
    auto left = slice.make_fragment_A(slice.partition_A(tile<64, 64, true>(a)));
    product<64, true>(mma, left, accumulator, reinterpret_cast<Element const*>(b));
  }

 private:
  template <int K, bool TRANSPOSED = false, class Mma, class Left, int HALF>
  __device__ void product(Mma& mma, Left const& left, float (&accumulator)[HALF], Element const* b) const {
    using namespace cute;
    auto slice = mma.get_slice(thread);
    auto right = slice.make_fragment_B(slice.partition_B(tile<2 * HALF, K, TRANSPOSED>(b)));
    auto c = make_tensor(&accumulator[0], Layout<Shape<Shape<_2, _2, Int<HALF / 4>>, _1, _1>>{});
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
void run_sm90(__grid_constant__ typename C::Params const p) {
  using Arch = Sm90<C>;
  using Element = typename Arch::Element;
  extern __shared__ char raw[];
  // Aligned by an offset, so that it is seen to be shared memory; but where that is known, backward's parked tile spills.
  char* base = raw + (-cute::cast_smem_ptr_to_uint(raw) & (Arch::kAlignment - 1));
  if constexpr (Arch::kBackward && !Arch::kAccumulates)
    base = reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(raw) + Arch::kAlignment - 1) &
                                   ~std::uintptr_t(Arch::kAlignment - 1));
  Element* ring = reinterpret_cast<Element*>(base);
  char* own = base + Arch::kStages * Arch::kItemBytes;
  auto& barriers = *reinterpret_cast<typename Arch::Barriers*>(own + Arch::kGroups * Arch::kOwn);
  int const warpgroup = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Arch::kStages; ++slot) {
      barriers.full[slot].init(1);                                 // the producer's arrival, and the bytes that it announces
      barriers.empty[slot].init(4 * Arch::kGroups * Arch::kCluster);
    }
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();                                            // the barriers are there, for both blocks

  Images const images = images_of<C>(p);
  bool const resident = Arch::kAccumulates || p.sets * images.chunks <= Arch::kStages;
  int const rank = static_cast<int>(cute::block_rank_in_cluster());
  // Both blocks of a cluster go through the same number of tiles, rows or not, for they load for each other.
  constexpr int rows = 64 * Arch::kGroups * Arch::kCluster;
  auto const first = [] { return static_cast<int>(blockIdx.x / Arch::kCluster); };
  auto const step = [] { return static_cast<int>(gridDim.x / Arch::kCluster); };

  if (warpgroup < Arch::kHelpers) {
    cutlass::arch::warpgroup_reg_dealloc<Arch::kHelperRegisters>();
    if (threadIdx.x < 32 && cute::elect_one_sync()) {
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
        CUTE_NO_UNROLL
        for (int slot = 0; slot < p.sets * images.chunks; ++slot) barriers.full[slot].wait(0);   // also sets that nobody reads
      } else {
        CUTE_NO_UNROLL
        for (int tile = first(); std::int64_t(tile) * rows < p.rows; tile += step())
          CUTE_NO_UNROLL
          for (int step = 0; step < steps_of(p); ++step) load_set(set_of(p, iteration_of(p, step)));
      }
    }
    __syncwarp();
    if constexpr (Arch::kAccumulates) {
      Arch arch{own, 0, thread};
      Gradients<C> gradients(p, arch, warpgroup, thread);
      CUTE_NO_UNROLL
      for (int tile = first(); std::int64_t(tile) * rows < p.rows; tile += step())
        CUTE_NO_UNROLL
        for (int step = 0; step < steps_of(p); ++step)
          for (int group = 0; group < Arch::kGroups; ++group) gradients.add(group, step);
      gradients.store(blockIdx.x);
    }
    cute::cluster_sync();                                          // no block leaves while the other may still write to it
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<Arch::kConsumerRegisters>();
  int const group = Arch::kGroups == 1 ? 0 : warpgroup - Arch::kHelpers;
  Arch arch{own, group, thread};
  typename Arch::Weights weights{barriers, ring, resident, images.chunks, thread % 32};
  CUTE_NO_UNROLL
  for (int tile = first(); std::int64_t(tile) * rows < p.rows; tile += step())
    Pass<C>::run(p, arch, weights, std::int64_t(tile) * rows + (rank * Arch::kGroups + group) * 64, thread);
  cute::cluster_sync();
}

template <class C>
int Sm90<C>::launch(typename C::Params const& p, int multiprocessors, CUstream_st* stream) {
  auto const kernel = run_sm90<C>;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) return error;
  std::int64_t const cluster = 64 * kGroups * kCluster, clusters = (p.rows + cluster - 1) / cluster;
  int most = multiprocessors / kCluster;
  if constexpr (kAccumulates) most = p.blocks / kCluster < most ? p.blocks / kCluster : most;
  unsigned const blocks = static_cast<unsigned>(clusters < most ? clusters : most) * kCluster;
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace score
