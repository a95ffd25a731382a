// What the kernels take for granted of registers and shared memory, held to CuTe's own layouts. Runs on the host; no GPU.
#include <cstdio>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "iterate.cuh"

using namespace cute;
using Element = cutlass::bfloat16_t;

static int wrong = 0;

static void check(bool holds, char const* what) {
  if (!holds && wrong++ < 10) std::printf("wrong: %s\n", what);
}

static int row_of(int i, int thread) { return thread / 32 * 16 + thread % 32 / 4 + 8 * score::half_of(i); }

// Registers of the accumulator of a 64 x N product are where iterate.cuh says, and in pairs, in their order, the A operand of
// the next product, whose depth is N.
template <int N, class Produced, class Next>
void fragments(Produced produced, Next next, char const* name) {
  Tensor identity = make_identity_tensor(Shape<_64, Int<N>>{});
  for (int thread = 0; thread < 128; ++thread) {
    Tensor c = produced.get_slice(thread).partition_C(identity);
    Tensor a = next.get_slice(thread).partition_A(identity);
    check(size(c) == N / 2 && size(a) == N / 2, name);
    for (int i = 0; i < N / 2; ++i) {
      check(get<0>(c(i)) == row_of(i, thread) && get<1>(c(i)) == score::column_of(i, thread % 32), name);
      check(get<0>(a(i)) == get<0>(c(i)) && get<1>(a(i)) == get<1>(c(i)), name);
    }
  }
}

template <int N>
void fragments_of_wgmma() {
  constexpr auto K = GMMA::Major::K;
  fragments<N>(make_tiled_mma(GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<N>, _64>, K, K>()),
               make_tiled_mma(GMMA::rs_op_selector<Element, Element, float, Shape<_64, _64, Int<N>>, K, K>()), "wgmma");
}

// mma.sync: one warp has 16 rows, its atoms along N follow each other.
template <int N>
void fragments_of_mma() {
  auto mma = make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{}, Layout<Shape<_4, _1, _1>>{});
  fragments<N>(mma, mma, "mma.sync");
}

// ldmatrix as sm80.cuh addresses it brings the B operand of two products: matrix m, whose rows lanes 8 m ... 8 m + 7 address,
// gives lane l the columns 2 (l % 4), + 1 of its row l / 4.
void operand_of_ldmatrix() {
  auto mma = make_tiled_mma(SM80_16x8x16_F32BF16BF16F32_TN{});
  Tensor identity = make_identity_tensor(Shape<_8, _16>{});
  for (int thread = 0; thread < 32; ++thread) {
    Tensor b = mma.get_slice(thread).partition_B(identity);
    for (int m = 0; m < 4; ++m) {
      int const lane = 8 * m + thread / 4, row = lane / 16 * 8 + lane % 8, column = lane / 8 % 2 * 8 + 2 * (thread % 4);
      for (int e = 0; e < 2; ++e)
        check(get<0>(b(2 * (m % 2) + e)) == row - m / 2 * 8 && get<1>(b(2 * (m % 2) + e)) == column + e, "ldmatrix");
    }
  }
}

// Packed weights are wgmma's swizzled tiles, each element has one place, and eight along K are one vector of 16 bytes.
template <int N, int K>
void swizzle() {
  using Atom = conditional_t<(K >= 64), GMMA::Layout_K_SW128_Atom<Element>, GMMA::Layout_K_SW64_Atom<Element>>;
  auto const tile = as_position_independent_swizzle_layout(tile_to_shape(Atom{}, Shape<Int<N>, Int<K>>{}));
  static bool taken[N * K];
  for (bool& t : taken) t = false;
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < K; ++k) {
      int const at = score::swizzled(n, k, N, K);
      check(at == tile(n, k), "the swizzle");
      check(at >= 0 && at < N * K && !taken[at], "one place for each element");
      check(at == score::swizzled(n, k / 8 * 8, N, K) + k % 8, "vectors of eight");
      taken[at] = true;
    }
  }
}

// What the threads of a group write of an operand in shared memory: each pair of its columns once, where wgmma reads it.
template <int K>
struct Operand {
  using Element = ::Element;
  static constexpr int kColumns = K;
  static constexpr bool kAccumulates = false;
};

template <int K>
void shared_operand() {
  using Atom = GMMA::Layout_K_SW128_Atom<Element>;
  auto const tile = as_position_independent_swizzle_layout(tile_to_shape(Atom{}, Shape<_64, Int<K>>{}));
  static std::uint32_t pairs[64 * K / 2];                          // 0 before it is written
  auto const name = [](int row, int column) { return static_cast<std::uint32_t>(row * K + column + 1); };
  for (int thread = 0; thread < 128; ++thread) {
    score::SharedOperand<Operand<K>> x(reinterpret_cast<Element*>(pairs), thread);
    for (int i = 0; i < K / 2; i += 2) {
      int const row = row_of(i, thread), column = score::column_of(i, thread % 32);
      check(pairs[tile(row, column) / 2] == 0, "an operand's pair is written once");
      x.write(i, name(row, column));
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < K; column += 2) {
      check(tile(row, column) % 2 == 0 && tile(row, column + 1) == tile(row, column) + 1, "an operand's pair is a word");
      check(pairs[tile(row, column) / 2] == name(row, column), "an operand's pair is where wgmma reads it");
    }
  }
}

// The same tile, K x N, is the operand N x K of the products that read it transposed.
template <int N, int K>
void transposed() {
  using Atom = conditional_t<N % 64 == 0, GMMA::Layout_MN_SW128_Atom<Element>, GMMA::Layout_MN_SW64_Atom<Element>>;
  auto const tile = as_position_independent_swizzle_layout(tile_to_shape(Atom{}, Shape<Int<N>, Int<K>>{}, Step<_2, _1>{}));
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) check(score::swizzled(k, n, K, N) == tile(n, k), "the swizzle, transposed");
}

int main() {
  fragments_of_wgmma<32>(), fragments_of_wgmma<64>(), fragments_of_wgmma<128>(), fragments_of_wgmma<256>();
  fragments_of_mma<32>(), fragments_of_mma<64>(), fragments_of_mma<128>();
  operand_of_ldmatrix();
  swizzle<64, 64>(), swizzle<128, 64>(), swizzle<64, 128>(), swizzle<32, 128>(), swizzle<128, 32>();
  swizzle<64, 256>(), swizzle<32, 256>(), swizzle<256, 32>();
  transposed<64, 64>(), transposed<128, 64>(), transposed<64, 128>(), transposed<32, 128>(), transposed<128, 32>();
  transposed<64, 32>(), transposed<32, 64>();
  shared_operand<256>();
  std::printf(wrong ? "%d wrong\n" : "all layouts hold\n", wrong);
  return wrong != 0;
}
