// The forward pass of one group of 64 rows: T iterations of norm, block and update, the state staying in registers.
//
// Who owns what, in a group of 128 threads (4 warps of 16 rows). The state is the accumulator fragment of a 64 x D product, and
// so is every tile here. Register i of a thread of lane l in warp w has
//
//      row     16 w + l / 4 + 8 (i / 2 % 2)                      lane:   0  1  2  3 |  0  1  2  3 | ...
//      column  8 (i / 4) + 2 (l % 4) + i % 2                     column: 01 23 45 67| 89 ..       |      row 0, registers 0 1 | 4 5
//                                                                        01 23 45 67| 89 ..       |      row 8, registers 2 3 | 6 7
//
// so that a row lives in the four lanes of a quad: two shuffles sum over it, and nothing else crosses threads. Pairs of columns,
// rounded to 16 bits, are in the same order the A operand of the next product (tests/cuda/layouts.cu checks both).
//
// `Arch` (sm90.cuh, sm80.cuh) says how a product is made and how weights arrive; `Block` (mlp_forward.cuh, linear_forward.cuh)
// is F and the update.
#pragma once
#include "activation.cuh"
#include "weights.cuh"

namespace score {

// One instantiation: D = Columns features, CHUNK hidden features at a time.
template <template <class> class ARCH, Op OP, class NUMBER, int COLUMNS, int CHUNK, bool GATED, Family FAMILY>
struct Config {
  using Number = NUMBER;
  using Element = typename NUMBER::type;
  static constexpr Op kOp = OP;
  static constexpr int kColumns = COLUMNS, kChunk = CHUNK;
  static constexpr bool kGated = GATED;
  static constexpr Family kFamily = FAMILY;
  static constexpr int kParts = Images::parts(OP, GATED), kItem = kParts * CHUNK * COLUMNS;   // elements
  using Arch = ARCH<Config>;
};

SCORE_HD int set_of(Forward const& p, int t) {
  return p.cyclic ? t % p.sets : static_cast<int>(std::int64_t(t) * p.sets / p.iterations);
}
SCORE_HD int column_of(int i, int lane) { return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1); }
SCORE_HD constexpr int half_of(int i) { return i >> 1 & 1; }                     // which of the thread's two rows

// For each pair of columns of a tile: f(register, half, column less that of the lane).
template <int COLUMNS, class F>
SCORE_HD void pairs_of(F f) {
  SCORE_UNROLL
  for (int i = 0; i < COLUMNS / 2; i += 2) f(i, half_of(i), 8 * (i >> 2));
}

// The thread's part of two rows. Rows that are not there read as 0 and are not written; no more does the padding.
template <int COLUMNS>
struct Rows {
  Forward const& p;
  int row, column;                                                               // within the block's work, and of the lane
  std::int64_t first;                                                            // row that the group begins at

  SCORE_HD Rows(Forward const& p_, std::int64_t first_, int thread)
      : p(p_), row((thread >> 5) * 16 + ((thread & 31) >> 2)), column(2 * (thread & 3)), first(first_) {}

  SCORE_HD std::int64_t element(int r) const { return (first + row + 8 * r) * p.features + column; }
  SCORE_HD int left(int r) const { return first + row + 8 * r < p.rows ? p.features - column : 0; }   // columns, from there on
  // Whether two columns are one aligned access.
  SCORE_HD bool paired() const {
    return p.features % 2 == 0 && (reinterpret_cast<std::uintptr_t>(p.h) | reinterpret_cast<std::uintptr_t>(p.x0) |
                                   reinterpret_cast<std::uintptr_t>(p.out)) % 4 == 0;
  }

  // f(register, two values) for each pair. Whether pairs are aligned is one branch a tile: one a pair costs registers.
  template <class Number, class F>
  SCORE_HD void load(void const* tensor, F f) const {
    using T = typename Number::type;
    T const* at[2] = {static_cast<T const*>(tensor) + element(0), static_cast<T const*>(tensor) + element(1)};
    int const end[2] = {left(0), left(1)};
    if (paired()) {
      pairs_of<COLUMNS>([&](int i, int r, int column) {
        f(i, Number::unpack(column < end[r] ? *reinterpret_cast<std::uint32_t const*>(at[r] + column) : 0u));
      });
    } else {
      pairs_of<COLUMNS>([&](int i, int r, int column) {
        f(i, float2{column < end[r] ? Number::load(at[r][column]) : 0.0f,
                    column + 1 < end[r] ? Number::load(at[r][column + 1]) : 0.0f});
      });
    }
  }

  template <class Number>
  SCORE_HD void store(void* tensor, float const (&y)[COLUMNS / 2]) const {
    using T = typename Number::type;
    T* at[2] = {static_cast<T*>(tensor) + element(0), static_cast<T*>(tensor) + element(1)};
    int const end[2] = {left(0), left(1)};
    if (paired()) {
      pairs_of<COLUMNS>([&](int i, int r, int column) {
        if (column < end[r]) *reinterpret_cast<std::uint32_t*>(at[r] + column) = Number::pack(y[i], y[i + 1]);
      });
    } else {
      pairs_of<COLUMNS>([&](int i, int r, int column) {
        if (column < end[r]) at[r][column] = Number::round(y[i]);
        if (column + 1 < end[r]) at[r][column + 1] = Number::round(y[i + 1]);
      });
    }
  }

  SCORE_HD void store_state(float* states, float const (&y)[COLUMNS / 2]) const {
    float* at[2] = {states + element(0), states + element(1)};
    int const end[2] = {left(0), left(1)};
    pairs_of<COLUMNS>([&](int i, int r, int column) {
      if (column < end[r]) at[r][column] = y[i];
      if (column + 1 < end[r]) at[r][column + 1] = y[i + 1];
    });
  }
};

// y <- q y + w F(x), specialised for each op.
template <class C, Op = C::kOp>
struct Block;

template <class C>
struct Iterate {
  using Number = typename C::Number;
  using Arch = typename C::Arch;
  static constexpr int kState = C::kColumns / 2;

  // Mean (layernorm's, else 0) and 1 / deviation of the thread's rows; the padding counts in no sum.
  static SCORE_HD void statistics(Forward const& p, Arch& arch, float const (&y)[kState], int lane, float (&mean)[2],
                                  float (&scale)[2]) {
    int const left = p.features - 2 * (lane & 3);
    auto sum = [&](auto term, float (&total)[2]) {
      total[0] = total[1] = 0.0f;
      if (p.features == C::kColumns) {
        SCORE_UNROLL
        for (int i = 0; i < kState; ++i) total[half_of(i)] += term(y[i], half_of(i));
      } else {
        SCORE_UNROLL
        for (int i = 0; i < kState; ++i) total[half_of(i)] += column_of(i, 0) < left ? term(y[i], half_of(i)) : 0.0f;
      }
      SCORE_UNROLL
      for (int r = 0; r < 2; ++r) total[r] = arch.quad_sum(total[r]) / float(p.features);
    };
    if (p.norm == Norm::layernorm) sum([](float x, int) { return x; }, mean);
    sum([&](float x, int r) { return (x - mean[r]) * (x - mean[r]); }, scale);
    SCORE_UNROLL
    for (int r = 0; r < 2; ++r) scale[r] = reciprocal_root(scale[r] + p.eps);
  }

  // x = norm(y), rounded, as operand A of the products of this iteration.
  static SCORE_HD void normalise(Forward const& p, Arch& arch, float const (&y)[kState], int lane, float const* vectors,
                                 Images const& images, std::uint32_t (&x)[C::kColumns / 4]) {
    float mean[2] = {0.0f, 0.0f}, scale[2] = {1.0f, 1.0f};
    if (p.norm != Norm::none) statistics(p, arch, y, lane, mean, scale);
    float const *gain = vectors + images.gain() + 2 * (lane & 3), *bias = gain + C::kColumns;
    pairs_of<C::kColumns>([&](int i, int r, int column) {
      float a = y[i], b = y[i + 1];
      if (p.norm != Norm::none) {
        float2 const g = *reinterpret_cast<float2 const*>(gain + column), s = *reinterpret_cast<float2 const*>(bias + column);
        a = fmaf((a - mean[r]) * scale[r], g.x, s.x);
        b = fmaf((b - mean[r]) * scale[r], g.y, s.y);
      }
      x[i / 2] = Number::pack(a, b);
    });
  }

  // All iterations of the group of rows that begins at `first`; `thread` counts within the group.
  static SCORE_HD void run(Forward const& p, Arch& arch, typename Arch::Weights& weights, std::int64_t first, int thread) {
    Rows<C::kColumns> const rows(p, first, thread);
    Images const images(C::kOp, C::kColumns, p.hidden, C::kChunk, C::kGated);
    int const lane = thread & 31;
    float y[kState];
    rows.template load<Number>(p.h, [&](int i, float2 v) { y[i] = v.x, y[i + 1] = v.y; });
    SCORE_NO_UNROLL
    for (int t = 0; t < p.iterations; ++t) {
      if (p.states != nullptr) rows.store_state(p.states + t * p.rows * p.features, y);
      if (p.state_scale != nullptr) each(y, [r = p.state_scale[t]](float v) { return r * v; });
      if (p.x0 != nullptr) {
        float const s = p.x0_scale == nullptr ? 1.0f : p.x0_scale[t];
        rows.template load<Number>(p.x0, [&](int i, float2 v) { y[i] = fmaf(s, v.x, y[i]), y[i + 1] = fmaf(s, v.y, y[i + 1]); });
      }
      int const set = set_of(p, t);
      float const* vectors = images.vectors(p.packed, set);
      std::uint32_t x[C::kColumns / 4];
      normalise(p, arch, y, lane, vectors, images, x);
      Block<C>::update(p, arch, weights, images, vectors, set, lane, x, y, p.coefficients[5 * t + 1], p.coefficients[5 * t + 3]);
    }
    if (p.states != nullptr) rows.store_state(p.states + p.iterations * p.rows * p.features, y);
    rows.template store<Number>(p.out, y);
  }
};

}  // namespace score
