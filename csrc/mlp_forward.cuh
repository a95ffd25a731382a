// F of mlp: u = act(x W1^T + b1), or gated act(x Wg^T + bg) * (x W1^T + b1), and F = u W2^T + b2.
//
// The state is the accumulator of the second product: it is scaled by q, and w is folded into u before that is rounded, so that
// the tensor core itself makes the update. The activation of chunk c runs while the second product of chunk c - 1 does.
#pragma once
#include "forward.cuh"

namespace score {

template <class C>
struct Block<C, Op::mlp, Forward> {
  using Arch = typename C::Arch;
  using Number = typename C::Number;
  static constexpr int kFragment = C::kChunk / 2, kPart = C::kChunk * C::kColumns;

  static SCORE_HD void update(Forward const& p, Arch& arch, typename Arch::Weights& weights, Images const& images,
                              float const* vectors, int set, int lane, typename Arch::Operand const& x,
                              float (&y)[C::kColumns / 2], float q, float w) {
    float const* result_bias = vectors + images.result_bias() + 2 * (lane & 3);
    pairs_within<C::kColumns>(p.features, [&](int i, int, int column) {
      float2 const b = *reinterpret_cast<float2 const*>(result_bias + column);
      y[i] = fmaf(q, y[i], w * b.x), y[i + 1] = fmaf(q, y[i + 1], w * b.y);
    });

    float u[kFragment], gate[C::kGated ? kFragment : 1];
    std::uint32_t v[kFragment / 2];
    auto up = [&](int chunk, int slot) {                          // in flight on return; the accumulators start from the biases
      float const* bias = vectors + chunk * C::kChunk + 2 * (lane & 3);
      pairs_of<C::kChunk>([&](int i, int, int column) {
        float2 const b = *reinterpret_cast<float2 const*>(bias + column);
        u[i] = b.x, u[i + 1] = b.y;
        if constexpr (C::kGated) {
          float2 const g = *reinterpret_cast<float2 const*>(bias + images.gate_bias() + column);
          gate[i] = g.x, gate[i + 1] = g.y;
        }
      });
      if constexpr (C::kGated) arch.landed(gate);
      arch.begin(u);
      arch.template multiply<C::kColumns>(u, x, weights.at(slot));
      if constexpr (C::kGated) arch.template multiply<C::kColumns>(gate, x, weights.at(slot) + kPart);
      arch.commit();
    };
    auto down = [&](int slot) {                                   // in flight on return
      arch.begin(y);
      arch.template multiply<C::kChunk>(y, v, weights.at(slot) + (C::kParts - 1) * kPart);
      arch.commit();
    };
    auto activated = [&] {
      arch.landed(u);
      if constexpr (C::kGated) {
        arch.landed(gate);
        activate<C::kFamily, Number>(gate, p.activation, p.negative_slope);
        SCORE_UNROLL
        for (int i = 0; i < kFragment; ++i) u[i] *= gate[i];
      } else {
        activate<C::kFamily, Number>(u, p.activation, p.negative_slope);
      }
      each(u, [=](float a) { return w * a; });
    };
    auto rounded = [&] {
      SCORE_UNROLL
      for (int i = 0; i < kFragment; i += 2) v[i / 2] = Number::pack(u[i], u[i + 1]);
    };

    int slot = weights.acquire(set, 0);
    up(0, slot);
    arch.template wait<0>();
    activated();
    rounded();
    SCORE_NO_UNROLL
    for (int chunk = 1; chunk < images.chunks; ++chunk) {
      int const next = weights.acquire(set, chunk);
      up(chunk, next);
      down(slot);
      arch.template wait<1>();
      activated();
      arch.template wait<0>();
      arch.landed(y);
      weights.release(slot);
      rounded();
      slot = next;
    }
    down(slot);
    arch.template wait<0>();
    arch.landed(y);
    weights.release(slot);
  }
};

}  // namespace score
