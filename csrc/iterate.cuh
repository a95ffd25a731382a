// What the passes share: who owns which part of a tile, how tiles come and go, norms.
//
// A group of 128 threads (4 warps of 16 rows) has 64 rows. Its state is the accumulator fragment of a 64 x D product, and so is
// every tile here. Register i of a thread of lane l in warp w has
//
//      row     16 w + l / 4 + 8 (i / 2 % 2)                      lane:   0  1  2  3 |  0  1  2  3 | ...
//      column  8 (i / 4) + 2 (l % 4) + i % 2                     column: 01 23 45 67| 89 ..       |      row 0, registers 0 1 | 4 5
//                                                                        01 23 45 67| 89 ..       |      row 8, registers 2 3 | 6 7
//
// so that a row lives in the four lanes of a quad: two shuffles sum over it, and nothing else crosses threads. Pairs of columns,
// rounded to 16 bits, are in the same order the A operand of the next product (tests/cuda/layouts.cu checks both).
//
// `Arch` (sm90.cuh, sm80.cuh) says how a product is made and how weights arrive; `Pass` (forward.cuh, backward.cuh) is the loop
// over T; `Block` (<op>_forward.cuh, <op>_backward.cuh) is F and the update, or its gradient.
#pragma once
#include "activation.cuh"
#include "weights.cuh"

namespace score {

// One instantiation: D = Columns features, CHUNK hidden features at a time. PARAMS, Forward or Backward, says which pass it is,
// and ACCUMULATES, of the latter, that a block keeps the gradients of the weights (gradients.cuh), so that there is no ring.
template <template <class> class ARCH, Op OP, class NUMBER, int COLUMNS, int CHUNK, bool GATED, Family FAMILY,
          class PARAMS = Forward, bool ACCUMULATES = false>
struct Config {
  using Params = PARAMS;
  using Number = NUMBER;
  using Element = typename NUMBER::type;
  static constexpr Op kOp = OP;
  static constexpr int kColumns = COLUMNS, kChunk = CHUNK;
  static constexpr bool kGated = GATED, kAccumulates = ACCUMULATES;
  static constexpr Family kFamily = FAMILY;
  static constexpr int kParts = Images::parts(OP, GATED), kItem = kParts * CHUNK * COLUMNS;   // elements
  using Arch = ARCH<Config>;
};

// All iterations of a group of rows.
template <class C, class PARAMS = typename C::Params>
struct Pass;

// What an op does in an iteration.
template <class C, Op = C::kOp, class PARAMS = typename C::Params>
struct Block;

// What accumulates is for one width of hidden features.
template <class C>
SCORE_HD Images images_of(Call const& p) {
  return {C::kOp, C::kColumns, C::kAccumulates ? C::kColumns : p.hidden, C::kChunk, C::kGated};
}
SCORE_HD int set_of(Call const& p, int t) {
  return p.cyclic ? t % p.sets : static_cast<int>(std::int64_t(t) * p.sets / p.iterations);
}
SCORE_HD int column_of(int i, int lane) { return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1); }
SCORE_HD constexpr int half_of(int i) { return i >> 1 & 1; }                     // which of the thread's two rows

// For each pair of columns of a tile, from column `first` on: f(register, half, column less that of the lane).
template <int COLUMNS, class F>
SCORE_HD void pairs_of(F f, int first = 0) {
  SCORE_UNROLL
  for (int i = first / 2; i < (first + COLUMNS) / 2; i += 2) f(i, half_of(i), 8 * (i >> 2));
}

// The same, of a wide tile 64 columns at a time, without those that are all padding. The branches also keep the compiler from
// beginning the loads of the whole tile at once, which at D = 256 takes more registers than there are.
template <int COLUMNS, class F>
SCORE_HD void pairs_within(int features, F f) {
  if constexpr (COLUMNS <= 128) {
    pairs_of<COLUMNS>(f);
  } else {
    SCORE_UNROLL
    for (int first = 0; first < COLUMNS; first += 64)
      if (first == 0 || first < features) pairs_of<64>(f, first);
  }
}

// For each pair of columns: f(register, the two floats of a vector that begins at its first column).
template <int COLUMNS, class F>
SCORE_HD void vector_of(float const* vector, int lane, F f) {
  float const* from = vector + 2 * (lane & 3);
  pairs_of<COLUMNS>([&](int i, int, int column) { f(i, *reinterpret_cast<float2 const*>(from + column)); });
}

// The thread's two rows of matrices (rows, width), of which it has a tile of COLUMNS columns that begins at column `from`. What
// is not there reads as 0 and is not written.
struct Rows {
  std::int64_t first, rows;                                                      // row that the group begins at; that there are
  int row, column;                                                               // within the group, and of the lane

  SCORE_HD Rows(std::int64_t first_, std::int64_t rows_, int thread)
      : first(first_), rows(rows_), row((thread >> 5) * 16 + ((thread & 31) >> 2)), column(2 * (thread & 3)) {}

  SCORE_HD std::int64_t element(int r, int width) const { return (first + row + 8 * r) * width + column; }
  SCORE_HD bool inside(int r) const { return first + row + 8 * r < rows; }
  SCORE_HD int left(int r, int width) const { return inside(r) ? width - column : 0; }   // columns, from there on

  // Whether two columns are one aligned access.
  template <class Number>
  static SCORE_HD bool paired(void const* matrix, int width) {
    return width % 2 == 0 && reinterpret_cast<std::uintptr_t>(matrix) % sizeof(typename Number::Pair) == 0;
  }

  // f(register, two values) for each pair. Whether pairs are aligned is one branch a tile: one a pair costs registers.
  template <class Number, int COLUMNS, class F>
  SCORE_HD void load(void const* matrix, int width, F f) const {
    using T = typename Number::type;
    T const* at[2] = {static_cast<T const*>(matrix) + element(0, width), static_cast<T const*>(matrix) + element(1, width)};
    int const end[2] = {left(0, width), left(1, width)};
    if (paired<Number>(matrix, width)) {
      pairs_within<COLUMNS>(width, [&](int i, int r, int column) {
        f(i, Number::unpack(column < end[r] ? *reinterpret_cast<typename Number::Pair const*>(at[r] + column)
                                            : typename Number::Pair{}));
      });
    } else {
      pairs_within<COLUMNS>(width, [&](int i, int r, int column) {
        f(i, float2{column < end[r] ? Number::load(at[r][column]) : 0.0f,
                    column + 1 < end[r] ? Number::load(at[r][column + 1]) : 0.0f});
      });
    }
  }

  // f(register) is a pair, as Number packs it.
  template <class Number, int COLUMNS, class F>
  SCORE_HD void store(void* matrix, int width, F f, int from = 0) const {
    using T = typename Number::type;
    T* at[2] = {static_cast<T*>(matrix) + element(0, width) + from, static_cast<T*>(matrix) + element(1, width) + from};
    int const end[2] = {left(0, width) - from, left(1, width) - from};
    if (paired<Number>(matrix, width)) {
      pairs_within<COLUMNS>(width, [&](int i, int r, int column) {
        if (column < end[r]) *reinterpret_cast<typename Number::Pair*>(at[r] + column) = f(i);
      });
    } else {
      pairs_within<COLUMNS>(width, [&](int i, int r, int column) {
        float2 const pair = Number::unpack(f(i));
        if (column < end[r]) at[r][column] = Number::round(pair.x);
        if (column + 1 < end[r]) at[r][column + 1] = Number::round(pair.y);
      });
    }
  }
};

// Operand A of an iteration's first products, x = norm(y) rounded, written a pair of columns at a time: in registers ...
template <class C>
struct RegisterOperand {
  std::uint32_t a[C::kColumns / 4];
  SCORE_HD void write(int i, std::uint32_t pair) { a[i / 2] = pair; }
};

// ... or, where these have no room beside the state, in shared memory, 64 x D and swizzled as the weights are.
template <class C>
struct SharedOperand {
  typename C::Element* tile;
  int row, lane;
  SCORE_HD SharedOperand(typename C::Element* tile_, int thread) : tile(tile_) {
    if constexpr (C::kAccumulates) forget(thread);                 // or all addresses are kept through all iterations
    row = (thread >> 5) * 16 + ((thread & 31) >> 2), lane = thread & 31;
  }
  SCORE_HD void write(int i, std::uint32_t pair) {
    int const at = swizzled(row + 8 * half_of(i), column_of(i, lane), 64, C::kColumns);
    *reinterpret_cast<std::uint32_t*>(tile + at) = pair;
  }
};

// The norm of the thread's rows of a state: (y - mean) * scale, then gain and bias. The padding counts in no sum.
template <class C>
struct Whitening {
  static constexpr int kState = C::kColumns / 2;
  float mean[2] = {0.0f, 0.0f}, scale[2] = {1.0f, 1.0f};                          // mean: layernorm's, else 0

  SCORE_HD Whitening(Call const& p, typename C::Arch& arch, float const (&y)[kState], int lane) {
    if (p.norm == Norm::none) return;
    if (p.norm == Norm::layernorm) average(p, arch, lane, mean, [&](int i) { return y[i]; });
    average(p, arch, lane, scale, [&](int i) { return (y[i] - mean[half_of(i)]) * (y[i] - mean[half_of(i)]); });
    SCORE_UNROLL
    for (int r = 0; r < 2; ++r) scale[r] = reciprocal_root(scale[r] + p.eps);
  }

  SCORE_HD float operator()(float y, int r) const { return (y - mean[r]) * scale[r]; }

  // The average over the features of each row.
  template <class F>
  static SCORE_HD void average(Call const& p, typename C::Arch& arch, int lane, float (&total)[2], F term) {
    int const left = p.features - 2 * (lane & 3);
    total[0] = total[1] = 0.0f;
    if (p.features == C::kColumns) {
      SCORE_UNROLL
      for (int i = 0; i < kState; ++i) total[half_of(i)] += term(i);
    } else {
      SCORE_UNROLL
      for (int i = 0; i < kState; ++i) total[half_of(i)] += column_of(i, 0) < left ? term(i) : 0.0f;
    }
    SCORE_UNROLL
    for (int r = 0; r < 2; ++r) total[r] = arch.quad_sum(total[r]) / float(p.features);
  }

  // x = norm(y), rounded, the padding too.
  template <class Operand>
  SCORE_HD void operand(Call const& p, float const (&y)[kState], int lane, float const* vectors, Images const& images,
                        Operand& x) {
    forget(mean[0]), forget(mean[1]);                              // or all y - mean would be kept for below
    float const *gain = vectors + images.gain() + 2 * (lane & 3), *bias = gain + C::kColumns;
    auto plain = [&](int i, int, int) { x.write(i, C::Number::pack(y[i], y[i + 1])); };
    auto normed = [&](int i, int r, int column) {
      float2 const g = *reinterpret_cast<float2 const*>(gain + column), s = *reinterpret_cast<float2 const*>(bias + column);
      x.write(i, C::Number::pack(fmaf((*this)(y[i], r), g.x, s.x), fmaf((*this)(y[i + 1], r), g.y, s.y)));
    };
    SCORE_UNROLL
    for (int first = 0; first < C::kColumns; first += 64) {
      if (p.norm == Norm::none)
        pairs_of<64>(plain, first);
      else
        pairs_of<64>(normed, first);
    }
  }
};

// h_t becomes z = r h_t + s x0.
template <class C>
SCORE_HD void start(Call const& p, Rows const& rows, int t, float (&y)[C::kColumns / 2]) {
  if (p.state_scale != nullptr) each(y, [r = p.state_scale[t]](float v) { return r * v; });
  if (p.x0 != nullptr) {
    float const s = p.x0_scale == nullptr ? 1.0f : p.x0_scale[t];
    rows.load<typename C::Number, C::kColumns>(
        p.x0, p.features, [&](int i, float2 v) { y[i] = fmaf(s, v.x, y[i]), y[i + 1] = fmaf(s, v.y, y[i + 1]); });
  }
}

}  // namespace score
