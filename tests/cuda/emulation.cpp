// The forward kernels on a CPU: csrc/forward.cuh and the blocks as they are, over an Arch whose products are loops.
//
// What a thread of a kernel shares with others stays within its quad of four lanes, so four threads that go from quad to quad
// are a whole grid. A product runs as late as it may, at the wait that ends it: a fragment that is read before its wait, or an
// operand that is overwritten before it, gives a wrong result here, as it may on a GPU. So does an item of the ring that is used
// after its release. What this does not show is in sm90.cuh and sm80.cuh: instructions, barriers, copies.
#include <barrier>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "linear_forward.cuh"
#include "mlp_forward.cuh"

namespace score {

// What the lanes of a quad exchange.
struct Quad {
  std::barrier<> barrier{4};
  float sum[4];
  std::uint32_t const* a[4];
  bool wrong = false;                                              // an item was used that is not held, or too many are
};

template <class C>
struct Emulated {
  using Element = typename C::Element;

  struct Weights {
    Forward const& p;
    Images images;
    Quad& quad;
    std::deque<int> held{};

    int acquire(int set, int chunk) {
      held.push_back(set * images.chunks + chunk);
      if (held.size() > 2) quad.wrong = true;
      return held.back();
    }
    void release() { held.pop_front(); }
    Element const* at(int slot) {
      int const set = slot / images.chunks, chunk = slot % images.chunks;
      return reinterpret_cast<Element const*>(images.items(p.packed, set)) + std::size_t(chunk) * images.item();
    }
    bool holds(Element const* part) {
      for (int slot : held)
        if (at(slot) <= part && part < at(slot) + images.item()) return true;
      return false;
    }
  };

  Quad& quad;
  Weights& weights;
  int lane;
  std::vector<std::function<void()>> open{};
  std::deque<std::vector<std::function<void()>>> groups{};

  float quad_sum(float v) {
    quad.sum[lane] = v;
    quad.barrier.arrive_and_wait();
    float const total = (quad.sum[lane] + quad.sum[lane ^ 1]) + (quad.sum[lane ^ 2] + quad.sum[lane ^ 3]);
    quad.barrier.arrive_and_wait();
    return total;
  }

  template <int N>
  void landed(float (&)[N]) {}
  template <int N>
  void begin(float (&)[N]) {}
  void commit() {
    groups.push_back(std::move(open));
    open.clear();
  }
  template <int PENDING>
  void wait() {
    for (; groups.size() > PENDING; groups.pop_front())
      for (auto& run : groups.front()) run();
  }

  template <int K, int HALF, int WORDS>
  void multiply(float (&c)[HALF], std::uint32_t const (&a)[WORDS], Element const* b) {
    static_assert(WORDS == K / 4);
    open.push_back([this, &c, &a, b] {
      if (!weights.holds(b)) quad.wrong = true;
      quad.a[lane] = a;
      quad.barrier.arrive_and_wait();
      for (int i = 0; i < HALF; ++i) {
        for (int k = 0; k < K; ++k) {
          // The lane of the quad that has column k of A, and the register: see the diagram in forward.cuh.
          float2 const pair = C::Number::unpack(quad.a[k % 8 / 2][4 * (k / 16) + 2 * (k % 16 / 8) + half_of(i)]);
          c[i] = std::fma(k % 2 ? pair.y : pair.x, C::Number::load(b[swizzled(column_of(i, lane), k, 2 * HALF, K)]), c[i]);
        }
      }
      quad.barrier.arrive_and_wait();
    });
  }
};

template <class Number>
void pack_all(Pack const& pack) {
  Images const images(pack.op, pack.columns, pack.hidden, pack.chunk, pack.gated);
  for (int set = 0; set < pack.sets; ++set) {
    for (int at = 0; at < images.chunks * (images.item() / 8); ++at) pack_group<Number>(pack, images, set, at);
    for (int at = 0; at < images.floats(); ++at) pack_float<Number>(pack, images, set, at);
  }
}

template <class C>
bool run(Pack pack, Forward p) {
  Images const images(C::kOp, C::kColumns, p.hidden, C::kChunk, C::kGated);
  std::vector<char> packed(images.bytes() * p.sets + 16);
  pack.columns = C::kColumns, pack.chunk = C::kChunk, p.packed = pack.packed = packed.data();
  pack_all<typename C::Number>(pack);
  Quad quad;
  auto lane = [&](int lane) {
    for (std::int64_t first = 0; first < p.rows; first += 64) {
      for (int q = 0; q < 32; ++q) {
        int const thread = q * 4 + lane;
        if (first + thread / 32 * 16 + thread % 32 / 4 >= p.rows) continue;      // both rows of the quad are not there
        typename Emulated<C>::Weights weights{p, images, quad};
        Emulated<C> arch{quad, weights, lane};
        Iterate<C>::run(p, arch, weights, first, thread);
        if (!weights.held.empty() || !arch.groups.empty()) quad.wrong = true;
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(lane, i);
  for (auto& thread : threads) thread.join();
  return !quad.wrong;
}

template <Op OP, class Number, int COLUMNS, int CHUNK, bool GATED>
bool run_family(Family family, Pack const& pack, Forward const& p) {
  switch (family) {
    case Family::relu: return run<Config<Emulated, OP, Number, COLUMNS, CHUNK, GATED, Family::relu>>(pack, p);
    case Family::piecewise: return run<Config<Emulated, OP, Number, COLUMNS, CHUNK, GATED, Family::piecewise>>(pack, p);
    case Family::gelu: return run<Config<Emulated, OP, Number, COLUMNS, CHUNK, GATED, Family::gelu>>(pack, p);
    default: return run<Config<Emulated, OP, Number, COLUMNS, CHUNK, GATED, Family::sigmoidal>>(pack, p);
  }
}

template <class Number, int COLUMNS, int CHUNK>
bool run_op(Family family, Pack const& pack, Forward const& p) {
  if (pack.op == Op::linear) return run_family<Op::linear, Number, COLUMNS, CHUNK, false>(family, pack, p);
  return pack.gated ? run_family<Op::mlp, Number, COLUMNS, CHUNK, true>(family, pack, p)
                    : run_family<Op::mlp, Number, COLUMNS, CHUNK, false>(family, pack, p);
}

template <class Number>
bool run_size(int columns, int chunk, Family family, Pack const& pack, Forward const& p) {
  if (columns == 64) return run_op<Number, 64, 64>(family, pack, p);
  return chunk == 64 ? run_op<Number, 128, 64>(family, pack, p) : run_op<Number, 128, 32>(family, pack, p);
}

}  // namespace score

// 0, or 1 if the ring was not kept to its rules.
extern "C" int emulate(int op, int dtype, int columns, int chunk, int gated, int norm_float32, int norm, int activation,
                       int cyclic, std::int64_t rows, int features, int hidden, int iterations, int sets,
                       float slope, float eps, void const* h, void const* x0, void* out, float* states,
                       float const* coefficients, float const* state_scale, float const* x0_scale, std::int64_t const* table) {
  using namespace score;
  Pack const pack{Op(op), Dtype(dtype), features, hidden, sets, 0, 0, gated != 0, norm_float32 != 0, table, nullptr};
  Forward const p{rows, features, hidden, iterations, sets, cyclic != 0, Norm(norm), Activation(activation), slope, eps,
                  h, x0, out, states, coefficients, state_scale, x0_scale, nullptr};
  auto const run = Dtype(dtype) == Dtype::float16 ? run_size<Half> : run_size<BFloat16>;
  return run(columns, chunk, family(p.activation), pack, p) ? 0 : 1;
}
