// The gradient of mlp's F, L = <g, w F(x)>: du = g W2, dz = w du * act'(z), dx = dz W1; gated also dgate, and dx += dgate Wg.
//
// z is computed again, a chunk at a time. Forward's packed weights serve: two of the products read them transposed. A group has
// no registers left to run the last product of a chunk under the derivatives of the next; the other group's products do.
#pragma once
#include "backward.cuh"

namespace score {

template <class C>
struct Block<C, Op::mlp, Backward> {
  using Arch = typename C::Arch;
  using Number = typename C::Number;
  static constexpr int kState = C::kColumns / 2, kFragment = C::kChunk / 2, kPart = C::kChunk * C::kColumns;
  static constexpr int kGate = C::kGated ? kFragment : 1;

  // Adds dL/dx to dx, and to dw the thread's part of dL/dw. g is read where it is parked.
  static SCORE_HD void reverse(Iteration<C> const& it, typename Arch::Operand const& x, float (&dx)[kState], float (&dw)[2]) {
    Backward const& p = it.p;
    Arch& arch = it.arch;
    auto a = arch.operand(kGradient);
    arch.rewrite(a, [&] {
      vector_of<C::kColumns>(it.vectors + it.images.result_bias(), it.lane, [&](int i, float2 b) {
        float2 const g = arch.parked(i);
        dw[half_of(i)] = fmaf(g.x, b.x, fmaf(g.y, b.y, dw[half_of(i)]));
        // As a field it is 0 in rows that are not there.
        a.write(i, !C::kAccumulates || it.rows.inside(half_of(i)) ? Number::pack(g.x, g.y) : 0);
      });
    });
    if constexpr (!C::kAccumulates) it.template record<C::kColumns>(kGradient, [&](int i) { return a.a[i / 2]; });

    float z[kFragment], du[kFragment], gate[kGate];
    std::uint32_t u[kFragment / 2], dz[kFragment / 2], dgate[C::kGated ? kFragment / 2 : 1];
    auto up = [&](int chunk, int slot) {                          // in flight on return
      float const* bias = it.vectors + chunk * C::kChunk;
      vector_of<C::kChunk>(bias, it.lane, [&](int i, float2 b) { z[i] = b.x, z[i + 1] = b.y, du[i] = du[i + 1] = 0.0f; });
      if constexpr (C::kGated) {
        vector_of<C::kChunk>(bias + it.images.gate_bias(), it.lane, [&](int i, float2 b) { gate[i] = b.x, gate[i + 1] = b.y; });
        arch.landed(gate);
      }
      arch.landed(z);
      arch.begin(du);
      auto const* item = it.weights.at(slot);
      arch.template multiply<C::kColumns>(z, x, item);
      if constexpr (C::kGated) arch.template multiply<C::kColumns>(gate, x, item + kPart);
      arch.template multiply<C::kColumns, true>(du, a, item + (C::kParts - 1) * kPart);
      arch.commit();
    };
    auto down = [&](int slot) {                                   // in flight on return
      auto const* item = it.weights.at(slot);
      arch.begin(dx);
      arch.template multiply<C::kChunk, true>(dx, dz, item);
      if constexpr (C::kGated) arch.template multiply<C::kChunk, true>(dx, dgate, item + kPart);
      arch.commit();
    };
    // What the products left becomes u, dz and dgate: operands, and what the ring takes.
    auto differentiated = [&] {
      arch.landed(z);
      arch.landed(du);
      float const w = it.w;
      auto add_dw = [&](int i, float u0, float u1) { dw[half_of(i)] = fmaf(du[i], u0, fmaf(du[i + 1], u1, dw[half_of(i)])); };
      if constexpr (C::kGated) {
        arch.landed(gate);
        differentiate<C::kFamily, Number>(gate, p.activation, p.negative_slope, [&](int i, float2 v0, float2 v1) {
          float const u0 = v0.x * z[i], u1 = v1.x * z[i + 1], d0 = w * du[i], d1 = w * du[i + 1];
          add_dw(i, u0, u1);
          u[i / 2] = Number::pack(w * u0, w * u1);
          dz[i / 2] = Number::pack(d0 * v0.x, d1 * v1.x);
          dgate[i / 2] = Number::pack(d0 * z[i] * v0.y, d1 * z[i + 1] * v1.y);
        });
      } else {
        differentiate<C::kFamily, Number>(z, p.activation, p.negative_slope, [&](int i, float2 v0, float2 v1) {
          add_dw(i, v0.x, v1.x);
          u[i / 2] = Number::pack(w * v0.x, w * v1.x);
          dz[i / 2] = Number::pack(w * du[i] * v0.y, w * du[i + 1] * v1.y);
        });
      }
    };
    auto record = [&](int field, int chunk, auto const& tile) {
      it.template record<C::kChunk>(field, [&](int i) { return tile[i / 2]; }, chunk * C::kChunk);
    };

    SCORE_NO_UNROLL
    for (int chunk = 0; chunk < it.images.chunks; ++chunk) {
      int const slot = it.weights.acquire(it.set, chunk);
      up(chunk, slot);
      arch.template wait<0>();
      differentiated();
      down(slot);
      record(kHidden, chunk, u);
      record(kDerivative, chunk, dz);
      if constexpr (C::kGated) record(kGateDerivative, chunk, dgate);
      it.hand_over(chunk);
      arch.template wait<0>();
      arch.landed(dx);
      it.weights.release(slot);
    }
  }
};

}  // namespace score
