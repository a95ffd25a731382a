// Random odd problems for a kernel, and whether what it makes of one agrees with plain.cuh.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "plain.cuh"

namespace score {

// Memory that both sides of a comparison reach, all of it filled with one byte: what is outside of an array has to stay so.
class Memory {
 public:
  using Take = void* (*)(std::size_t bytes);
  using Give = void (*)(void*);

  Memory(Take take, Give give) : take_(take), give_(give) {}
  Memory(Memory const&) = delete;
  ~Memory() {
    for (Block const& block : blocks_) give_(block.base);
  }

  // `skipped` elements beyond an address that is a multiple of 256.
  template <class T>
  T* array(std::int64_t count, int skipped = 0) {
    Block const block{nullptr, kGuard + skipped * sizeof(T), count * sizeof(T)};
    blocks_.push_back(block);
    char*& base = blocks_.back().base;
    base = static_cast<char*>(take_(block.first + block.bytes + kGuard));
    if (base == nullptr) throw std::bad_alloc();
    std::memset(base, kFill, block.first + block.bytes + kGuard);
    return reinterpret_cast<T*>(base + block.first);
  }

  bool intact() const {
    for (Block const& block : blocks_) {
      char const* const end = block.base + block.first + block.bytes;
      for (char const* at = block.base; at < end + kGuard; at = at + 1 == block.base + block.first ? end : at + 1)
        if (*at != kFill) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr char kFill = 0x5a;
  struct Block {
    char* base;
    std::size_t first, bytes;
  };
  Take take_;
  Give give_;
  std::vector<Block> blocks_;
};

// A problem, drawn from a seed. `fast` is what the kernel is given; `plain` has results of its own.
template <class Number>
class Case {
 public:
  using T = typename Number::type;
  Pack pack{};
  Forward fast{}, plain{};
  std::string text;

  // rows: how many, or 0, and the seed says it.
  Case(Kernel const& kernel, unsigned seed, std::int64_t rows, Memory& memory) : memory_(memory), random_(seed) {
    Forward p{};
    p.iterations = pick({1, 2, 3, 5});
    p.sets = pick({1, 1 + below(p.iterations), p.iterations});
    p.features = pick({kernel.columns, kernel.columns, kernel.columns - 1, kernel.columns - 2, kernel.columns / 2 + 3, 1});
    p.hidden = p.features;
    if (kernel.op == Op::mlp) {
      int const chunk = kernel.chunk;
      p.hidden = pick({chunk, 1, chunk - 1, chunk + 1, 3 * chunk + 5, (kernel.stages + 1) * chunk});
    }
    p.rows = rows ? rows : pick({1, 5, kernel.rows - 1, kernel.rows + 1, 2 * kernel.rows + 17});
    p.cyclic = below(2);
    p.norm = Norm(below(3));
    do p.activation = Activation(below(9));
    while (family(p.activation) != kernel.family);
    p.negative_slope = 0.1f, p.eps = pick({1e-5f, 1e-3f});
    // What squares a state that no norm holds would overflow in a few iterations.
    if (p.norm == Norm::none && (kernel.gated || p.activation == Activation::relu2)) p.iterations = p.sets = 1;

    std::int64_t const state = p.rows * p.features;
    T* const h = numbers<T>(state, 1.0f);
    p.h = h;
    poisoned = below(4) ? -1 : below(static_cast<int>(p.rows));
    if (poisoned >= 0) h[poisoned * p.features + below(p.features)] = Number::round(std::numeric_limits<float>::quiet_NaN());
    if (below(2)) {
      p.x0 = numbers<T>(state, 0.5f);
      if (below(2)) p.x0_scale = numbers<float>(p.iterations, 1.0f);
    }
    if (below(2)) p.state_scale = numbers<float>(p.iterations, 1.0f);
    float* const coefficients = numbers<float>(5 * p.iterations, 1.0f);    // of these the second and the fourth count
    for (int t = 0; t < p.iterations; ++t) {
      float const dt = 0.1f + 0.8f * unit();
      coefficients[5 * t + 1] = 1.0f - dt, coefficients[5 * t + 3] = dt;
    }
    p.coefficients = coefficients;
    draw_parameters(kernel, p);

    fast = plain = p;
    bool const in_place = below(4) == 0, states = below(2);
    fast.out = memory.array<T>(state, below(2)), plain.out = memory.array<T>(state);
    if (in_place) fast.h = std::memcpy(fast.out, h, state * sizeof(T));
    if (states) {
      fast.first = plain.first = below(p.iterations);
      std::int64_t const kept = (p.iterations + 1 - fast.first) * state;
      fast.states = memory.array<float>(kept, below(2)), plain.states = memory.array<float>(kept);
    }
    pack.packed = memory.array<char>(packed_bytes(pack));
    fast.packed = pack.packed;

    auto const add = [&](char const* name, auto value) {
      text += std::string(text.empty() ? "" : ", ") + name + " " + std::to_string(value);
    };
    add("seed", seed), add("rows", p.rows), add("features", p.features), add("hidden", p.hidden);
    add("iterations", p.iterations), add("sets", p.sets), add("cyclic", p.cyclic), add("norm", int(p.norm));
    add("activation", int(p.activation)), add("in place", in_place), add("states", states), add("x0", p.x0 != nullptr);
    add("NaN in row", poisoned);
  }

  // Nothing, or what is wrong with the results of both sides.
  std::string judge() const {
    constexpr double eps = Number::dtype == Dtype::float16 ? 0x1p-10 : 0x1p-7;
    if (!memory_.intact()) return "something outside of the arrays was written";
    if (fast.states != nullptr) {
      for (int t = fast.first; t <= fast.iterations; ++t) {
        std::int64_t const first = (t - fast.first) * fast.rows * fast.features;
        std::string const wrong = compare(fast.states + first, plain.states + first, [](float x) { return x; }, eps);
        if (!wrong.empty()) return "state " + std::to_string(t) + ", " + wrong;
      }
    }
    return compare(static_cast<T const*>(fast.out), static_cast<T const*>(plain.out), Number::load, eps);
  }

  // The largest error of a row that `judge` met, as a share of what it allows.
  mutable double worst = 0.0;
  std::int64_t poisoned;                                           // the row that has a NaN, or -1

 private:
  Memory& memory_;
  std::mt19937 random_;

  int below(int n) { return static_cast<int>(random_() % n); }
  float unit() { return static_cast<float>(random_() >> 8) * 0x1p-24f; }
  template <class U>
  U pick(std::initializer_list<U> values) {
    return values.begin()[below(static_cast<int>(values.size()))];
  }
  static void set(T& x, float value) { x = Number::round(value); }
  static void set(float& x, float value) { x = value; }

  // Numbers around `mean`, less than `scale` from it; on an odd address every other time.
  template <class U>
  U* numbers(std::int64_t count, float scale, float mean = 0.0f) {
    U* const all = memory_.array<U>(count, below(2));
    for (std::int64_t i = 0; i < count; ++i) set(all[i], mean + scale * (2.0f * unit() - 1.0f));
    return all;
  }

  void draw_parameters(Kernel const& kernel, Forward const& p) {
    pack.op = kernel.op, pack.dtype = kernel.dtype, pack.columns = kernel.columns, pack.chunk = kernel.chunk;
    pack.gated = kernel.gated, pack.features = p.features, pack.hidden = p.hidden, pack.sets = p.sets;
    pack.norm_float32 = below(2);
    bool const linear = kernel.op == Op::linear, biases = below(4) != 0, gain = below(4) != 0, norm_bias = below(2);
    int const count = linear ? 4 : 8;
    std::int64_t* const table = memory_.array<std::int64_t>(p.sets * count);
    float const up = 2.0f / std::sqrt(float(p.features)), down = 2.0f / std::sqrt(float(p.hidden));
    auto const address = [](void const* at) { return reinterpret_cast<std::int64_t>(at); };
    auto const of_norm = [&](float mean) {
      return pack.norm_float32 ? address(numbers<float>(p.features, 0.3f, mean)) : address(numbers<T>(p.features, 0.3f, mean));
    };
    for (std::int64_t* set = table; set < table + p.sets * count; set += count) {
      std::memset(set, 0, count * sizeof *set);
      std::int64_t const weight = std::int64_t(p.hidden) * p.features;
      set[0] = address(numbers<T>(weight, up));
      if (biases) set[1] = address(numbers<T>(p.hidden, 0.5f));
      if (!linear) {
        set[2] = address(numbers<T>(weight, down));
        if (biases) set[3] = address(numbers<T>(p.features, 0.5f));
        if (kernel.gated) set[4] = address(numbers<T>(weight, up));
        if (kernel.gated && biases) set[5] = address(numbers<T>(p.hidden, 0.5f));
      }
      if (p.norm != Norm::none && gain) set[linear ? 2 : 6] = of_norm(1.0f);
      if (p.norm != Norm::none && norm_bias) set[linear ? 3 : 7] = of_norm(0.0f);
    }
    pack.table = table;
  }

  // Row by row: the norm of the difference, against that of the row, or a tenth of the mean row's if the row is small. What is
  // rounded the other way is an error near eps where there are few features, and a norm may enlarge it: hence 8 eps, but 2 on
  // average. The row with a NaN has to have one in both.
  template <class U, class F>
  std::string compare(U const* found, U const* expected, F value, double eps) const {
    int const n = fast.features;
    auto const norm = [&](std::int64_t row, double a, double b) {  // of a * found + b * expected
      double sum = 0.0;
      for (std::int64_t i = row * n; i < (row + 1) * n; ++i) {
        double const x = (a ? a * value(found[i]) : 0.0) + (b ? b * value(expected[i]) : 0.0);
        sum += x * x;
      }
      return std::sqrt(sum);
    };
    double mean = 0.0, errors = 0.0;
    for (std::int64_t row = 0; row < fast.rows; ++row)
      if (row != poisoned) mean += norm(row, 0, 1) / double(fast.rows);
    for (std::int64_t row = 0; row < fast.rows; ++row) {
      if (row == poisoned) {
        if (!std::isnan(norm(row, 1, 0)) || !std::isnan(norm(row, 0, 1))) return "row " + std::to_string(row) + ": no NaN";
        continue;
      }
      double const error = norm(row, 1, -1), size = std::fmax(norm(row, 0, 1), 0.1 * mean);
      worst = std::fmax(worst, error / size / (8 * eps));
      errors += error / size;
      if (!(error <= 8 * eps * size))
        return "row " + std::to_string(row) + ": error " + std::to_string(error) + " of " + std::to_string(size) +
               ", allowed is " + std::to_string(8 * eps) + " of it";
    }
    if (errors <= 2 * eps * static_cast<double>(fast.rows)) return "";
    return "the rows' mean error is " + std::to_string(errors / static_cast<double>(fast.rows)) + ", allowed is " +
           std::to_string(2 * eps);
  }
};

}  // namespace score
