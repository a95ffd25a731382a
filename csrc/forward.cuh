// The forward pass of one group of 64 rows: T iterations of norm, block and update, the state staying in registers.
#pragma once
#include "iterate.cuh"

namespace score {

SCORE_HD int steps_of(Forward const& p) { return p.iterations; }
SCORE_HD int iteration_of(Forward const&, int step) { return step; }

template <class C>
struct Pass<C, Forward> {
  using Number = typename C::Number;
  static constexpr int kState = C::kColumns / 2;

  // The rows that begin at `first`; `thread` counts within the group.
  static SCORE_HD void run(Forward const& p, typename C::Arch& arch, typename C::Arch::Weights& weights, std::int64_t first,
                           int thread) {
    Rows const rows(first, p.rows, thread);
    Images const images = images_of<C>(p);
    int const lane = thread & 31;
    auto x = arch.operand(0);
    float y[kState] = {};
    auto store_state = [&](int t) {
      if (p.states == nullptr || t < p.first) return;
      rows.store<Float32, C::kColumns>(p.states + (t - p.first) * p.rows * p.features, p.features,
                                       [&](int i) { return Float32::pack(y[i], y[i + 1]); });
    };
    rows.load<Number, C::kColumns>(p.h, p.features, [&](int i, float2 v) { y[i] = v.x, y[i + 1] = v.y; });
    SCORE_NO_UNROLL
    for (int t = 0; t < p.iterations; ++t) {
      store_state(t);
      start<C>(p, rows, t, y);
      int const set = set_of(p, t);
      float const* vectors = images.vectors(p.packed, set);
      arch.rewrite(x, [&] { Whitening<C>(p, arch, y, lane).operand(p, y, lane, vectors, images, x); });
      Block<C>::update(p, arch, weights, images, vectors, set, lane, x, y, p.coefficients[5 * t + 1], p.coefficients[5 * t + 3]);
    }
    store_state(p.iterations);
    rows.store<Number, C::kColumns>(p.out, p.features, [&](int i) { return Number::pack(y[i], y[i + 1]); });
  }
};

}  // namespace score
