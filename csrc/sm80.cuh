// Ampere and everything without kernels of its own: products by mma.sync, weights by cp.async, which all threads issue.
//
//   block   kGroups groups of 128 threads, with 64 rows each
//   ring    kStages items of weights. If all items of a call fit, they are loaded once and stay; otherwise they go round
#pragma once
#include <cuda_runtime.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "iterate.cuh"

namespace score {

template <class C>
struct Sm80 {
  static constexpr int kArch = 80, kGroups = 2, kThreads = 128 * kGroups;
  static constexpr int kMaximum = 99 << 10;                        // what the smallest devices of this family have
  static constexpr int kItemBytes = 2 * C::kItem, kFit = kMaximum / kItemBytes, kStages = kFit < 16 ? kFit : 16;
  static constexpr int kSharedBytes = kStages * kItemBytes;
  static_assert(kStages >= 3);                                     // two items are in use at a time

  static int launch(Forward const&, int multiprocessors, CUstream_st*);      // a cudaError_t

  using Element = typename C::Element;
  using Operand = RegisterOperand<C>;

  // The ring, whose next item every thread helps to load when it asks for one.
  struct Weights {
    Forward const& p;
    Images images;
    char* ring;
    bool resident;
    int slot = 0, t = 0, chunk = 0;                                // of the next item to ask for; t and chunk: to load

    __device__ Weights(Forward const& p_, char* ring_)
        : p(p_), images(C::kOp, C::kColumns, p_.hidden, C::kChunk, C::kGated), ring(ring_),
          resident(p_.sets * images.chunks <= kStages) {
      if (resident) {
        for (int item = 0; item < p.sets * images.chunks; ++item) load(item, item / images.chunks, item % images.chunks);
        cute::cp_async_fence();
        cute::cp_async_wait<0>();
        __syncthreads();
      } else {
        for (int item = 0; item < kStages - 2; ++item) load_next(item);
      }
    }
    __device__ int acquire(int set, int chunk_) {
      if (resident) return set * images.chunks + chunk_;
      cute::cp_async_wait<kStages - 3>();
      __syncthreads();                                             // all have this item, and are done with the one before the last
      int const found = slot, free = slot >= 2 ? slot - 2 : slot - 2 + kStages;
      load_next(free);
      slot = slot + 1 < kStages ? slot + 1 : 0;
      return found;
    }
    __device__ void release(int) const {}
    __device__ Element const* at(int slot_) const { return reinterpret_cast<Element const*>(ring + slot_ * kItemBytes); }
    // What was loaded ahead for a tile that does not come has landed.
    __device__ void drain() const { cute::cp_async_wait<0>(); }

   private:
    __device__ void load(int to, int set, int chunk_) const {
      char const* from = images.items(p.packed, set) + std::size_t(chunk_) * kItemBytes;
      SCORE_NO_UNROLL
      for (int i = threadIdx.x * 16; i < kItemBytes; i += kThreads * 16)
        cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*reinterpret_cast<cute::uint128_t const*>(from + i),
                                                               *reinterpret_cast<cute::uint128_t*>(ring + to * kItemBytes + i));
    }
    __device__ void load_next(int to) {
      load(to, set_of(p, t), chunk);
      cute::cp_async_fence();
      if (++chunk == images.chunks) chunk = 0, t = t + 1 < p.iterations ? t + 1 : 0;
    }
  };

  int thread;

  __device__ float quad_sum(float v) const {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
  }

  __device__ Operand operand(int) const { return {}; }
  template <class F>
  __device__ void rewrite(Operand&, F write) const {
    write();
  }

  // mma.sync has landed when the instruction after it reads it.
  template <int N>
  __device__ void landed(float (&)[N]) const {}
  template <int N>
  __device__ void begin(float (&)[N]) const {}
  __device__ void commit() const {}
  template <int PENDING>
  __device__ void wait() const {}

  // accumulator += A B^T: A is 64 x K, B is N x K at `b`. One ldmatrix brings the operand B of two products.
  template <int K, int HALF, int WORDS>
  __device__ void multiply(float (&c)[HALF], std::uint32_t const (&a)[WORDS], Element const* b) const {
    static_assert(WORDS == K / 4);
    constexpr int N = 2 * HALF;
    int const lane = thread % 32, row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8;
    using Mma = cute::conditional_t<C::Number::dtype == Dtype::float16, cute::SM80_16x8x16_F32F16F16F32_TN,
                                    cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    SCORE_UNROLL
    for (int k = 0; k < K / 16; ++k) {
      SCORE_UNROLL
      for (int n = 0; n < N / 16; ++n) {
        std::uint32_t f[4];
        Element const* from = b + swizzled(16 * n + row, 16 * k + column, N, K);
        cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<cute::uint128_t const*>(from), f[0], f[1], f[2], f[3]);
        SCORE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float* d = &c[8 * n + 4 * i];
          Mma::fma(d[0], d[1], d[2], d[3], a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], f[2 * i], f[2 * i + 1], d[0], d[1],
                   d[2], d[3]);
        }
      }
    }
  }
  template <int K, int HALF>
  __device__ void multiply(float (&c)[HALF], Operand const& x, Element const* b) const {
    multiply<K>(c, x.a, b);
  }
};

template <class C>
__global__ __launch_bounds__(Sm80<C>::kThreads, 1) void forward_sm80(__grid_constant__ Forward const p) {
  using Arch = Sm80<C>;
  extern __shared__ __align__(1024) char ring[];
  typename Arch::Weights weights(p, ring);
  int const group = threadIdx.x / 128, thread = threadIdx.x % 128;
  Arch arch{thread};
  std::int64_t const tile = Arch::kGroups * 64, step = gridDim.x * tile;
  SCORE_NO_UNROLL
  for (std::int64_t row = blockIdx.x * tile; row < p.rows; row += step)
    Pass<C>::run(p, arch, weights, row + group * 64, thread);
  weights.drain();
}

template <class C>
int Sm80<C>::launch(Forward const& p, int multiprocessors, CUstream_st* stream) {
  auto const kernel = forward_sm80<C>;
  if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) return error;
  std::int64_t const tile = 64 * kGroups, tiles = (p.rows + tile - 1) / tile;
  unsigned const blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  kernel<<<blocks, kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace score
