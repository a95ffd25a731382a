// The weights as the forward kernels read them: packed once a call into images of shared memory.
//
// A set is `chunks` items, then vectors of float32. An item is what one chunk of hidden features needs, so that a ring of items
// is filled by plain copies, whatever D, H, alignment and strides the caller's weights have:
//
//   mlp     W1[chunk, :] (chunk x D) | Wg[chunk, :] if gated (chunk x D) | W2[:, chunk] (D x chunk)
//   linear  W[chunk, :] (chunk x D)
//   vectors bias of the items (chunks * chunk) | of the gate, if gated | of the result, for mlp (D) | gain (D) | norm bias (D)
//
// D is padded to `columns` and H to whole chunks, with zeros; a gain or bias that is not given is 1 or 0.
#pragma once
#include "numbers.cuh"

namespace score {

// Where element (n, k) of an N x K operand is, in elements: rows of 64 (or, where K is 32, of 32) elements, their groups of
// eight exchanged so that the eight rows of an ldmatrix, and of wgmma's 128 (64) byte swizzle, lie in different banks.
SCORE_HD int swizzled(int n, int k, int rows, int width) {
  int const line = width < 64 ? width : 64;
  int const group = k % line / 8 ^ (line == 64 ? n & 7 : n >> 1 & 3);
  return k / line * (rows * line) + n * line + group * 8 + k % 8;
}

struct Images {
  Op op;
  int columns, chunk, chunks;
  bool gated;

  SCORE_HD Images(Op op_, int columns_, int hidden, int chunk_, bool gated_)
      : op(op_), columns(columns_), chunk(chunk_),
        chunks((hidden + chunk_ - 1) / chunk_), gated(gated_) {}

  static SCORE_HD constexpr int parts(Op op, bool gated) { return op == Op::linear ? 1 : gated ? 3 : 2; }
  SCORE_HD int part() const { return chunk * columns; }                     // in elements, as all offsets in an item
  SCORE_HD int item() const { return parts(op, gated) * part(); }
  SCORE_HD int width() const { return chunks * chunk; }                     // hidden features, padded

  // In floats from the beginning of the vectors.
  SCORE_HD int gate_bias() const { return width(); }
  SCORE_HD int result_bias() const { return width() * (gated ? 2 : 1); }
  SCORE_HD int gain() const { return result_bias() + (op == Op::mlp ? columns : 0); }
  SCORE_HD int norm_bias() const { return gain() + columns; }
  SCORE_HD int floats() const { return norm_bias() + columns; }

  SCORE_HD std::size_t bytes() const {                                      // of a set
    return (std::size_t(chunks) * item() * 2 + std::size_t(floats()) * 4 + 127) / 128 * 128;
  }
  SCORE_HD char const* items(void const* packed, int set) const { return static_cast<char const*>(packed) + set * bytes(); }
  SCORE_HD float const* vectors(void const* packed, int set) const {
    return reinterpret_cast<float const*>(items(packed, set) + std::size_t(chunks) * item() * 2);
  }
};

// The columns of the table of addresses, in the order of SHAPES in score_kernels/problem.py.
struct Columns {
  int weight, bias, out, out_bias, gate, gate_bias, gain, norm_bias, count;
};
SCORE_HD constexpr Columns columns_of(Op op) {
  return op == Op::linear ? Columns{0, 1, -1, -1, -1, -1, 2, 3, 4} : Columns{0, 1, 2, 3, 4, 5, 6, 7, 8};
}

// Writes one group of eight elements of the items, `at` counting all groups of a set.
template <class Number>
SCORE_HD void pack_group(Pack const& p, Images const& images, int set, int at) {
  using T = typename Number::type;
  Columns const columns = columns_of(p.op);
  std::int64_t const* addresses = p.table + std::int64_t(set) * columns.count;
  int const groups = images.part() / 8, chunk = at / (images.item() / 8), part = at / groups % images.parts(p.op, p.gated);
  bool const transposed = p.op == Op::mlp && part == images.parts(p.op, p.gated) - 1;         // W2: (D, H), a chunk of columns
  int const rows = transposed ? p.columns : p.chunk, width = transposed ? p.chunk : p.columns;
  int const n = at % groups / (width / 8), k = at % (width / 8) * 8;
  int const column = transposed ? columns.out : part == 0 ? columns.weight : columns.gate;
  T const* weight = reinterpret_cast<T const*>(addresses[column]);
  int const height = transposed ? p.features : p.hidden, length = transposed ? p.hidden : p.features;
  int const row = n + (transposed ? 0 : chunk * p.chunk), first = k + (transposed ? chunk * p.chunk : 0);
  T* to = reinterpret_cast<T*>(const_cast<char*>(images.items(p.packed, set))) + std::size_t(chunk) * images.item() +
          part * images.part() + swizzled(n, k, rows, width);
  SCORE_UNROLL
  for (int i = 0; i < 8; ++i) {
    bool const inside = row < height && first + i < length;
    to[i] = inside ? weight[std::int64_t(row) * length + first + i] : Number::round(0.0f);
  }
}

// Writes one float of the vectors.
template <class Number>
SCORE_HD void pack_float(Pack const& p, Images const& images, int set, int at) {
  using T = typename Number::type;
  Columns const columns = columns_of(p.op);
  std::int64_t const* addresses = p.table + std::int64_t(set) * columns.count;
  bool const of_norm = at >= images.gain(), is_gain = of_norm && at < images.norm_bias();
  int column = columns.bias, index = at, size = p.hidden;
  if (of_norm) {
    column = is_gain ? columns.gain : columns.norm_bias, index = at - (is_gain ? images.gain() : images.norm_bias());
    size = p.features;
  } else if (at >= images.result_bias()) {
    column = columns.out_bias, index = at - images.result_bias(), size = p.features;
  } else if (at >= images.gate_bias()) {
    column = columns.gate_bias, index = at - images.gate_bias();
  }
  void const* given = reinterpret_cast<void const*>(addresses[column]);
  float value = is_gain && index < size ? 1.0f : 0.0f;
  if (given != nullptr && index < size)
    value = of_norm && p.norm_float32 ? static_cast<float const*>(given)[index]
                                      : Number::load(static_cast<T const*>(given)[index]);
  const_cast<float*>(images.vectors(p.packed, set))[at] = value;
}

}  // namespace score
