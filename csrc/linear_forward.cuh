// F of linear: act(x W^T + b), the columns of the result in chunks: the activation follows the product, so that the product has
// an accumulator of its own. The activations of one group of rows run while the products of the other do.
#pragma once
#include "forward.cuh"

namespace score {

template <class C>
struct Block<C, Op::linear, Forward> {
  using Arch = typename C::Arch;
  static constexpr int kFragment = C::kChunk / 2;

  static SCORE_HD void update(Forward const& p, Arch& arch, typename Arch::Weights& weights, Images const& images,
                              float const* vectors, int set, int lane, typename Arch::Operand const& x,
                              float (&y)[C::kColumns / 2], float q, float w) {
    int const left = p.features - 2 * (lane & 3);
    SCORE_UNROLL
    for (int chunk = 0; chunk < C::kColumns / C::kChunk; ++chunk) {
      if (chunk >= images.chunks) break;                          // the rest is padding
      float const* bias = vectors + chunk * C::kChunk + 2 * (lane & 3);
      float u[kFragment];
      pairs_of<C::kChunk>([&](int i, int, int column) {
        float2 const b = *reinterpret_cast<float2 const*>(bias + column);
        u[i] = b.x, u[i + 1] = b.y;
      });
      int const slot = weights.acquire(set, chunk);
      arch.begin(u);
      arch.template multiply<C::kColumns>(u, x, weights.at(slot));
      arch.commit();
      arch.template wait<0>();
      arch.landed(u);
      weights.release(slot);
      activate<C::kFamily, typename C::Number>(u, p.activation, p.negative_slope);
      SCORE_UNROLL
      for (int i = 0; i < kFragment; ++i) {
        float& state = y[chunk * kFragment + i];
        // The state's padding has to stay 0, which sigmoid(0) is not.
        bool const inside = C::kFamily != Family::sigmoidal || chunk * C::kChunk + column_of(i, 0) < left;
        state = fmaf(q, state, inside ? w * u[i] : 0.0f);
      }
    }
  }
};

}  // namespace score
