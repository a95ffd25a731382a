// The gradient of linear's F, L = <g, w F(x)>: da = w g act'(a), dx = da W, the columns of the result in chunks.
#pragma once
#include "backward.cuh"

namespace score {

template <class C>
struct Block<C, Op::linear, Backward> {
  using Arch = typename C::Arch;
  using Number = typename C::Number;
  static constexpr int kState = C::kColumns / 2, kFragment = C::kChunk / 2;

  // Adds dL/dx to dx, and to dw the thread's part of dL/dw. g is read where it is parked.
  static SCORE_HD void reverse(Iteration<C> const& it, typename Arch::Operand const& x, float (&dx)[kState], float (&dw)[2]) {
    Backward const& p = it.p;
    Arch& arch = it.arch;
    SCORE_NO_UNROLL
    for (int chunk = 0; chunk < it.images.chunks; ++chunk) {       // the rest is padding
      int const from = chunk * C::kChunk;
      float a[kFragment];
      std::uint32_t da[kFragment / 2];
      vector_of<C::kChunk>(it.vectors + from, it.lane, [&](int i, float2 b) { a[i] = b.x, a[i + 1] = b.y; });
      int const slot = it.weights.acquire(it.set, chunk);
      arch.begin(a);
      arch.template multiply<C::kColumns>(a, x, it.weights.at(slot));
      arch.commit();
      arch.template wait<0>();
      arch.landed(a);
      differentiate<C::kFamily, Number>(a, p.activation, p.negative_slope, [&](int i, float2 v0, float2 v1) {
        float2 const g = arch.parked(from / 2 + i);
        dw[half_of(i)] = fmaf(g.x, v0.x, fmaf(g.y, v1.x, dw[half_of(i)]));
        da[i / 2] = Number::pack(it.w * g.x * v0.y, it.w * g.y * v1.y);
      });
      arch.begin(dx);
      arch.template multiply<C::kChunk, true>(dx, da, it.weights.at(slot));
      arch.commit();
      it.template record<C::kChunk>(kGradient, [&](int i) { return da[i / 2]; }, from);
      arch.template wait<0>();
      arch.landed(dx);
      it.weights.release(slot);
    }
  }
};

}  // namespace score
