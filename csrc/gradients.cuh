// The gradients of mlp's weights, in the registers of two warpgroups for as long as their block lives: dW1 = dz^T n of the one,
// dW2^T = (w u)^T g of the other, both H x D. The groups of the backward pass hand over what these are products of, for 64 rows
// and an iteration at a time, in four tiles of shared memory: n, g, w u and dz, rows of D or H numbers of 16 bits, swizzled as
// the weights are, of which the products read all transposed. For the biases a warpgroup sums the columns of dz, or of w g.
//
// What it has at the end of a launch it adds to what is the block's in memory, in an order that is always the same.
#pragma once
#include "iterate.cuh"

namespace score {

SCORE_HD int steps_of(Backward const& p) { return p.iterations - p.first; }
SCORE_HD int iteration_of(Backward const& p, int step) { return p.iterations - 1 - step; }

template <class C>
struct Gradients {
  using Arch = typename C::Arch;
  using Element = typename C::Element;
  static constexpr int kBlocks = C::kColumns / 64;                 // of 64 hidden features
  static_assert(C::kOp == Op::mlp && !C::kGated && C::kChunk == 64);

  Backward const& p;
  Arch& arch;
  int which, thread;                                               // 0: W1 and its bias, 1: W2 and its; of the warpgroup
  float product[kBlocks][C::kColumns / 2], sum[kBlocks][2];

  SCORE_HD Gradients(Backward const& p_, Arch& arch_, int which_, int thread_)
      : p(p_), arch(arch_), which(which_), thread(thread_) {
    SCORE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      SCORE_UNROLL
      for (float& x : product[block]) x = 0.0f;
      sum[block][0] = sum[block][1] = 0.0f;
    }
  }

  // Of a group, what it handed over.
  SCORE_HD void add(int group, int step) {
    Element const *left = arch.tile(group, 3 - which), *right = arch.tile(group, which);
    Element const* summed = which == 0 ? left : right;
    float const scale = which == 0 ? 1.0f : p.coefficients[5 * iteration_of(p, step) + 3];
    SCORE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      arch.receive(group, block);
      arch.begin(product[block]);
      arch.multiply_transposed(product[block], left + 64 * 64 * block, right);
      arch.commit();
      add_columns(sum[block], summed + 64 * 64 * block, scale);
      arch.template wait<0>();
      arch.landed(product[block]);
    }
    arch.give_back(group);
  }

  // To the partial sums of a block.
  SCORE_HD void store(int block) {
    float* to = p.partials + (std::int64_t(block) * 2 + which) * (C::kColumns + 4) * C::kColumns;
    int const warp = thread / 32, lane = thread % 32;
    auto put = [&](int row, int column, float a, float b) {
      float2& pair = *reinterpret_cast<float2*>(to + row * C::kColumns + column);
      pair = float2{pair.x + a, pair.y + b};
    };
    SCORE_UNROLL
    for (int block = 0; block < kBlocks; ++block) {
      pairs_of<C::kColumns>([&](int i, int r, int) {
        put(64 * block + 16 * warp + lane / 4 + 8 * r, column_of(i, lane), product[block][i], product[block][i + 1]);
      });
      put(C::kColumns + warp, 64 * block + 2 * lane, sum[block][0], sum[block][1]);
    }
  }

 private:
  // Two columns of a tile of 64, 16 rows for each warp: those that the swizzle has in two places.
  SCORE_HD void add_columns(float (&total)[2], Element const* tile, float scale) const {
    SCORE_NO_UNROLL
    for (int half = 0; half < 2; ++half) {
      Element const* at = tile + swizzled(2 * (thread / 32) + half, 2 * (thread % 32), 64, 64);
      SCORE_UNROLL
      for (int row = 0; row < 64; row += 8) {
        float2 const pair = C::Number::unpack(*reinterpret_cast<std::uint32_t const*>(at + 64 * row));
        total[0] = fmaf(scale, pair.x, total[0]), total[1] = fmaf(scale, pair.y, total[1]);
      }
    }
  }
};

}  // namespace score
