// The backward pass of one group of 64 rows: g = dL/dh in registers, t = T-1 ... first, every h_t read from memory.
//
// An iteration makes z and x = norm(z) again from h_t. While the products run, dL/dx is their accumulator and g is parked in
// shared memory; then g <- q g + dL/dz. Nothing is summed over rows here: what the gradients of the parameters are products of
// goes to the ring, and the gradients of coefficients and scales are stored row by row.
#pragma once
#include "gradients.cuh"

namespace score {

// What the gradients of the weights are products of, in the ring's order. Where a block accumulates them these are tiles of
// shared memory, and after them that of x; g is an operand as it is.
enum Field { kNormed, kGradient, kHidden, kDerivative, kGateDerivative, kNormedOperand = kGateDerivative };

// What an iteration knows of itself.
template <class C>
struct Iteration {
  Backward const& p;
  typename C::Arch& arch;
  typename C::Arch::Weights& weights;
  Rows const& rows;
  Images const& images;
  int lane, t, set;
  float w;
  float const* vectors;

  // A field of the rows, or a tile of it that begins at column `from`: f is as Rows::store has it.
  template <int COLUMNS, class F>
  SCORE_HD void record(int field, F f, int from = 0) const {
    using Element = typename C::Element;
    if constexpr (C::kAccumulates) {
      auto tile = arch.operand(field);
      tile.tile += 64 * from;
      // Rows that are not there count as 0, whatever they are.
      pairs_of<COLUMNS>([&](int i, int r, int) { tile.write(i, rows.inside(r) ? f(i) : 0); });
    } else {
      if (p.ring == nullptr) return;
      std::int64_t const wide = field < 2 ? 0 : field - 2, width = field < 2 ? p.features : p.hidden;
      std::int64_t const before = std::int64_t(field - wide) * p.features + wide * p.hidden, steps = p.iterations - p.first;
      Element* to = static_cast<Element*>(p.ring) + p.rows * (steps * before + (t - p.first) * width);
      rows.template store<typename C::Number, COLUMNS>(to, int(width), f, from);
    }
  }

  // All fields of a chunk of hidden features have been recorded.
  SCORE_HD void hand_over(int chunk) const {
    if constexpr (C::kAccumulates) arch.hand_over(chunk);
  }
};

template <class C>
struct Pass<C, Backward> {
  using Number = typename C::Number;
  using Arch = typename C::Arch;
  static constexpr int kState = C::kColumns / 2, kScalars = 7;

  // The rows that begin at `first`; `thread` counts within the group.
  static SCORE_HD void run(Backward const& p, Arch& arch, typename Arch::Weights& weights, std::int64_t first, int thread) {
    Rows const rows(first, p.rows, thread);
    Images const images = images_of<C>(p);
    float g[kState];
    rows.load<Number, C::kColumns>(p.grad_out, p.features, [&](int i, float2 v) { g[i] = v.x, g[i + 1] = v.y; });
    auto add_grad_state = [&](int t) {
      if (p.grad_states == nullptr) return;
      rows.load<Float32, C::kColumns>(p.grad_states + t * p.grad_rows * p.features, p.features,
                                      [&](int i, float2 v) { g[i] += v.x, g[i + 1] += v.y; });
    };
    SCORE_NO_UNROLL
    for (int step = 0; step < steps_of(p); ++step) {
      int const t = iteration_of(p, step), set = C::kAccumulates ? 0 : set_of(p, t);
      int lane = thread;
      forget(lane);                                                // made again here, or mlp with gelu spills at D = 128
      lane &= 31;
      add_grad_state(t + 1);
      reverse({p, arch, weights, rows, images, lane, t, set, p.coefficients[5 * t + 3], images.vectors(p.packed, set)}, g);
    }
    add_grad_state(0);
    rows.store<Number, C::kColumns>(p.grad_h, p.features, [&](int i) {
      return p.first == 0 ? Number::pack(g[i], g[i + 1]) : Number::pack(0.0f, 0.0f);
    });
  }

 private:
  using It = Iteration<C>;

  // g = dL/dh_{t+1} becomes dL/dh_t.
  static SCORE_HD void reverse(It const& it, float (&g)[kState]) {
    Backward const& p = it.p;
    park(it, 0, g);
    float y[kState];
    load_state(it, y);
    start<C>(p, it.rows, it.t, y);
    if constexpr (C::kAccumulates) park(it, kState, y);
    Whitening<C> whitening(p, it.arch, y, it.lane);
    it.template record<C::kColumns>(kNormed, [&](int i) {
      return Number::pack(whitening(y[i], half_of(i)), whitening(y[i + 1], half_of(i)));
    });
    if (p.scalars != nullptr) {
      float along[2];
      dot(it, along, [&](int i) { return parked(it, i) * y[i]; });
      store_scalar(it, 0, along);
      store_scalar(it, 1, along);
    }
    auto x = it.arch.operand(kNormedOperand);
    it.arch.rewrite(x, [&] { whitening.operand(p, y, it.lane, it.vectors, it.images, x); });

    float dx[kState], dw[2] = {0.0f, 0.0f};
    SCORE_UNROLL
    for (int i = 0; i < kState; ++i) dx[i] = 0.0f;
    Block<C>::reverse(it, x, dx, dw);
    if (p.scalars != nullptr) {
      SCORE_UNROLL
      for (int r = 0; r < 2; ++r) dw[r] = it.arch.quad_sum(dw[r]);
      store_scalar(it, 3, dw);
    }

    if (p.norm != Norm::none) {
      if constexpr (C::kAccumulates) {
        normalise_backward(it, whitening, [&](int i) { return parked(it, kState + i); }, dx);
      } else {
        load_state(it, y);
        start<C>(p, it.rows, it.t, y);
        normalise_backward(it, whitening, [&](int i) { return y[i]; }, dx);
      }
    }
    float const q = p.coefficients[5 * it.t + 1];
    pairs_of<C::kColumns>([&](int i, int, int) {
      float2 const v = it.arch.parked(i);
      g[i] = fmaf(q, v.x, dx[i]), g[i + 1] = fmaf(q, v.y, dx[i + 1]);
    });
    finish(it, g);
    if constexpr (C::kAccumulates) it.arch.reclaim();
  }

  // Of z = r h + s x0: g = dL/dz becomes dL/dh.
  static SCORE_HD void finish(It const& it, float (&g)[kState]) {
    Backward const& p = it.p;
    float along[2];
    if (p.scalars != nullptr && p.state_scale != nullptr) {
      float h[kState];
      load_state(it, h);
      dot(it, along, [&](int i) { return g[i] * h[i]; });
      store_scalar(it, 5, along);
    }
    if (p.scalars != nullptr && p.x0_scale != nullptr) {
      float x0[kState];
      it.rows.template load<Number, C::kColumns>(p.x0, p.features, [&](int i, float2 v) { x0[i] = v.x, x0[i + 1] = v.y; });
      dot(it, along, [&](int i) { return g[i] * x0[i]; });
      store_scalar(it, 6, along);
    }
    if (p.grad_x0 != nullptr) {
      float const s = p.x0_scale == nullptr ? 1.0f : p.x0_scale[it.t];
      float sum[kState];
      if (it.t == p.iterations - 1) {
        SCORE_UNROLL
        for (int i = 0; i < kState; ++i) sum[i] = 0.0f;
      } else {
        it.rows.template load<Float32, C::kColumns>(p.grad_x0, p.features,
                                                    [&](int i, float2 v) { sum[i] = v.x, sum[i + 1] = v.y; });
      }
      it.rows.template store<Float32, C::kColumns>(p.grad_x0, p.features, [&](int i) {
        return Float32::pack(fmaf(s, g[i], sum[i]), fmaf(s, g[i + 1], sum[i + 1]));
      });
    }
    if (p.state_scale != nullptr) each(g, [r = p.state_scale[it.t]](float v) { return r * v; });
  }

  // dx = dL/dnorm(y) becomes dL/dy.
  template <class F>
  static SCORE_HD void normalise_backward(It const& it, Whitening<C> const& whitening, F y, float (&dx)[kState]) {
    Backward const& p = it.p;
    vector_of<C::kColumns>(it.vectors + it.images.gain(), it.lane,
                           [&](int i, float2 gain) { dx[i] *= gain.x, dx[i + 1] *= gain.y; });
    float mean[2] = {0.0f, 0.0f}, along[2];
    if (p.norm == Norm::layernorm) Whitening<C>::average(p, it.arch, it.lane, mean, [&](int i) { return dx[i]; });
    Whitening<C>::average(p, it.arch, it.lane, along, [&](int i) { return dx[i] * whitening(y(i), half_of(i)); });
    int const left = p.features - 2 * (it.lane & 3);
    SCORE_UNROLL
    for (int i = 0; i < kState; ++i) {
      int const r = half_of(i);
      dx[i] = (dx[i] - mean[r] - whitening(y(i), r) * along[r]) * whitening.scale[r];
      if (column_of(i, 0) >= left) dx[i] = 0.0f;                   // else layernorm's padding would grow
    }
  }

  // A tile that waits in shared memory until its registers are free again; the first is g.
  static SCORE_HD void park(It const& it, int tile, float const (&v)[kState]) {
    pairs_of<C::kColumns>([&](int i, int, int) { it.arch.parked(tile + i) = float2{v[i], v[i + 1]}; });
  }
  static SCORE_HD float parked(It const& it, int i) { return i % 2 ? it.arch.parked(i).y : it.arch.parked(i).x; }

  static SCORE_HD void load_state(It const& it, float (&y)[kState]) {
    Backward const& p = it.p;
    it.rows.template load<Float32, C::kColumns>(p.states + (it.t - p.first) * p.states_rows * p.features, p.features,
                                                [&](int i, float2 v) { y[i] = v.x, y[i + 1] = v.y; });
  }

  // The sum over each row.
  template <class F>
  static SCORE_HD void dot(It const& it, float (&total)[2], F term) {
    total[0] = total[1] = 0.0f;
    SCORE_UNROLL
    for (int i = 0; i < kState; ++i) total[half_of(i)] += term(i);
    SCORE_UNROLL
    for (int r = 0; r < 2; ++r) total[r] = it.arch.quad_sum(total[r]);
  }

  static SCORE_HD void store_scalar(It const& it, int index, float const (&value)[2]) {
    float* to = it.p.scalars + (std::int64_t(it.t - it.p.first) * kScalars + index) * it.p.rows + it.rows.first + it.rows.row;
    SCORE_UNROLL
    for (int r = 0; r < 2; ++r)
      if (it.lane % 4 == 0 && it.rows.inside(r)) to[8 * r] = value[r];
  }
};

}  // namespace score
