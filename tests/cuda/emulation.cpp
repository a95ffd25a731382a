// The kernels on a CPU: csrc/forward.cuh, backward.cuh and the blocks as they are, over an Arch whose products are loops.
//
// What a thread of a kernel shares with others stays within its quad of four lanes, so four lanes that go from quad to quad
// are a whole grid. Where a block accumulates the gradients of the weights, what it hands over of a tile of rows is kept, all
// iterations of it, until all quads are through; then the threads that accumulate have their turn.
//
// A product runs as late as it may, at the wait that ends it: a fragment that is read before its wait, or an operand that is
// overwritten before it, gives a wrong result here, as it may on a GPU. So does an item of the ring that is used after its
// release, and a chunk that is read before all have handed it over. Operand A of the first products is where sm90.cuh has it.
// What this does not show is in sm90.cuh and sm80.cuh: instructions, barriers, copies.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "gradients.cuh"
#include "linear_backward.cuh"
#include "linear_forward.cuh"
#include "mlp_backward.cuh"
#include "mlp_forward.cuh"
#include "problems.h"

namespace score {

// Runs body(0) to body(3) in turns, on this thread: each runs until it waits for the others. Threads of their own would spend
// their time waking each other, all the more where other processes want the processors.
class Lanes {
 public:
  explicit Lanes(std::function<void(int)> const& body) : body(body) {
    running = this;
    for (int i = 0; i < 4; ++i) {
      getcontext(&lanes[i]);
      stacks[i].reset(new char[kStack]);
      lanes[i].uc_stack.ss_sp = stacks[i].get();
      lanes[i].uc_stack.ss_size = kStack;
      lanes[i].uc_link = i < 3 ? &lanes[i + 1] : &caller;
      makecontext(&lanes[i], &Lanes::enter, 0);
    }
    swapcontext(&caller, &lanes[0]);
  }

  // Each lane waits equally often, so that all have come here when the first goes on.
  static void wait() {
    if (running->ended > 0) std::fputs("a lane waits for one that has ended\n", stderr), std::abort();
    int const lane = std::exchange(running->lane, (running->lane + 1) % 4);
    swapcontext(&running->lanes[lane], &running->lanes[running->lane]);
  }

 private:
  static constexpr std::size_t kStack = 8 << 20;
  static inline thread_local Lanes* running;

  static void enter() {
    running->body(running->lane);
    ++running->ended, ++running->lane;
  }

  std::function<void(int)> const& body;
  std::unique_ptr<char[]> stacks[4];
  ucontext_t lanes[4], caller;
  int lane = 0, ended = 0;
};

// What the lanes of a quad exchange.
struct Quad {
  float sum[4];
  std::uint32_t const* a[4];
  std::vector<std::uint16_t> tile;                                 // operand A, where it is in shared memory, and what else is
  std::vector<int> handed;                                         // by how many threads, chunk by chunk of all iterations
  bool wrong = false;                                              // what is not held or still in use was used
};

template <class C>
struct Emulated {
  using Element = typename C::Element;
  static constexpr bool kShared = C::kColumns > 128 || C::kAccumulates;
  static constexpr int kTile = 64 * C::kColumns, kTiles = C::kAccumulates ? 5 : 1, kChunks = C::kColumns / 64;
  using Operand = std::conditional_t<kShared, SharedOperand<C>, RegisterOperand<C>>;

  struct Weights {
    Call const& p;
    Images images;
    Quad& quad;
    std::deque<int> held{};

    int acquire(int set, int chunk) {
      held.push_back(set * images.chunks + chunk);
      if (held.size() > 2) quad.wrong = true;
      return held.back();
    }
    void release(int slot) {
      if (held.empty() || held.front() != slot) quad.wrong = true;
      held.pop_front();
    }
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
  int thread, lane;                                                // of the group, of the quad
  int step = 0;
  float2 own[C::kColumns / 2]{};
  std::vector<std::function<void()>> open{};
  std::deque<std::vector<std::function<void()>>> groups{};

  float quad_sum(float v) {
    quad.sum[lane] = v;
    Lanes::wait();
    float const total = (quad.sum[lane] + quad.sum[lane ^ 1]) + (quad.sum[lane ^ 2] + quad.sum[lane ^ 3]);
    Lanes::wait();
    return total;
  }

  float2& parked(int i) { return own[i / 2]; }
  Element* tile(int field) { return reinterpret_cast<Element*>(quad.tile.data()) + (kTiles * step + field) * kTile; }
  Operand operand(int field) {
    if constexpr (kShared)
      return {tile(field), thread};
    else
      return {};
  }
  template <class F>
  void rewrite(Operand&, F write) {
    if (!groups.empty()) quad.wrong = true;
    Lanes::wait();
    write();
    Lanes::wait();
  }

  void hand_over(int chunk) { ++quad.handed[step * kChunks + chunk]; }
  void reclaim() { ++step; }
  Element* tile(int, int field) { return tile(field); }
  void receive(int, int chunk) {
    if (quad.handed[step * kChunks + chunk] != 128) quad.wrong = true;
  }
  void give_back(int) { ++step; }
  template <int HALF>
  void multiply_transposed(float (&c)[HALF], Element const* a, Element const* b) {
    open.push_back([this, &c, a, b] {
      for (int i = 0; i < HALF; ++i) {
        int const m = thread / 32 * 16 + thread % 32 / 4 + 8 * half_of(i), n = column_of(i, thread);
        for (int k = 0; k < 64; ++k)
          c[i] = std::fma(C::Number::load(a[swizzled(k, m, 64, 64)]), C::Number::load(b[swizzled(k, n, 64, 2 * HALF)]), c[i]);
      }
    });
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

  template <int K, bool TRANSPOSED = false, int HALF, int WORDS>
  void multiply(float (&c)[HALF], std::uint32_t const (&a)[WORDS], Element const* b) {
    static_assert(WORDS == K / 4);
    product<K, TRANSPOSED>(c, b, &a[0], [this](int half, int k) {
      // The lane of the quad that has column k of A, and the register: see the diagram in forward.cuh.
      float2 const pair = C::Number::unpack(quad.a[k % 8 / 2][4 * (k / 16) + 2 * (k % 16 / 8) + half]);
      return k % 2 ? pair.y : pair.x;
    });
  }
  template <int K, bool TRANSPOSED = false, int HALF>
  void multiply(float (&c)[HALF], Operand const& x, Element const* b) {
    if constexpr (kShared)
      product<K, TRANSPOSED>(c, b, nullptr, [this, at = x.tile](int half, int k) {
        return C::Number::load(at[swizzled(thread / 32 * 16 + thread % 32 / 4 + 8 * half, k, 64, C::kColumns)]);
      });
    else
      multiply<K, TRANSPOSED>(c, x.a, b);
  }

 private:
  template <int K, bool TRANSPOSED = false, int HALF, class Left>
  void product(float (&c)[HALF], Element const* b, std::uint32_t const* a, Left left) {
    open.push_back([this, &c, b, a, left] {
      if (!weights.holds(b)) quad.wrong = true;
      quad.a[lane] = a;
      Lanes::wait();
      for (int i = 0; i < HALF; ++i) {
        for (int k = 0; k < K; ++k) {
          int const n = column_of(i, lane), at = TRANSPOSED ? swizzled(k, n, K, 2 * HALF) : swizzled(n, k, 2 * HALF, K);
          c[i] = std::fma(left(half_of(i), k), C::Number::load(b[at]), c[i]);
        }
      }
      Lanes::wait();
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
bool run(Pack pack, typename C::Params p) {
  Images const images = images_of<C>(p);
  std::vector<char> packed(images.bytes() * p.sets + 16);
  pack.columns = C::kColumns, pack.chunk = C::kChunk, p.packed = pack.packed = packed.data();
  pack_all<typename C::Number>(pack);
  using Arch = Emulated<C>;
  Quad quad;
  int const steps = C::kAccumulates ? steps_of(p) : 1;
  if (Arch::kShared) quad.tile.resize(std::size_t(steps) * Arch::kTiles * Arch::kTile);
  typename Arch::Weights none{p, images, quad};
  Lanes lanes([&](int lane) {
    auto rows = [&](std::int64_t first) {
      for (int q = 0; q < 32; ++q) {
        int const thread = q * 4 + lane;
        // Both rows of the quad may not be there: where rows are added up, they have to count as nothing.
        if (!C::kAccumulates && first + thread / 32 * 16 + thread % 32 / 4 >= p.rows) continue;
        typename Arch::Weights weights{p, images, quad};
        Arch arch{quad, weights, thread, lane};
        Pass<C>::run(p, arch, weights, first, thread);
        if (!weights.held.empty() || !arch.groups.empty()) quad.wrong = true;
      }
    };
    if constexpr (C::kAccumulates) {
      for (int block = 0; block < p.blocks; ++block) {
        std::deque<Arch> archs;
        std::deque<Gradients<C>> gradients;
        for (int i = 0; i < 64; ++i)
          gradients.emplace_back(p, archs.emplace_back(Arch{quad, none, i % 32 * 4 + lane, lane}), i / 32, i % 32 * 4 + lane);
        for (std::int64_t first = 64 * block; first < p.rows; first += 64 * p.blocks) {
          if (lane == 0) {
            std::fill(quad.tile.begin(), quad.tile.end(), 0xffff);               // NaN
            quad.handed.assign(steps * Arch::kChunks, 0);
          }
          Lanes::wait();
          rows(first);
          Lanes::wait();
          for (int i = 0; i < 64; ++i) {
            archs[i].step = 0;
            for (int step = 0; step < steps; ++step) gradients[i].add(0, step);
          }
          Lanes::wait();
        }
        for (auto& each : gradients) each.store(block);
      }
    } else {
      if (lane == 0) std::fill(quad.tile.begin(), quad.tile.end(), 0xffff);
      Lanes::wait();
      for (std::int64_t first = 0; first < p.rows; first += 64) rows(first);
    }
  });
  return !quad.wrong;
}

template <Op OP, class Number, int COLUMNS, int CHUNK, bool GATED, class PARAMS, bool ACCUMULATES = false>
bool run_family(Pack const& pack, PARAMS const& p) {
  auto run_one = [&](auto family) {
    return run<Config<Emulated, OP, Number, COLUMNS, CHUNK, GATED, decltype(family)::value, PARAMS, ACCUMULATES>>(pack, p);
  };
  switch (family(p.activation)) {
    case Family::relu: return run_one(std::integral_constant<Family, Family::relu>{});
    case Family::piecewise: return run_one(std::integral_constant<Family, Family::piecewise>{});
    case Family::gelu: return run_one(std::integral_constant<Family, Family::gelu>{});
    default: return run_one(std::integral_constant<Family, Family::sigmoidal>{});
  }
}

// CHUNK is also of gated mlp, but for the backward pass, whose chunks have 32 columns there.
template <class Number, int COLUMNS, int CHUNK, class PARAMS>
bool run_op(Pack const& pack, PARAMS const& p) {
  constexpr int gated = std::is_same_v<PARAMS, Backward> ? 32 : CHUNK;
  if (pack.op == Op::linear) return run_family<Op::linear, Number, COLUMNS, CHUNK, false>(pack, p);
  if constexpr (std::is_same_v<PARAMS, Backward>)
    if (p.partials != nullptr) return run_family<Op::mlp, Number, COLUMNS, CHUNK, false, Backward, true>(pack, p);
  return pack.gated ? run_family<Op::mlp, Number, COLUMNS, gated, true>(pack, p)
                    : run_family<Op::mlp, Number, COLUMNS, CHUNK, false>(pack, p);
}

template <class Number, class PARAMS>
bool run_size(Pack const& pack, PARAMS const& p) {
  if (pack.columns == 64) return run_op<Number, 64, 64>(pack, p);
  if constexpr (std::is_same_v<PARAMS, Forward>) {
    if (pack.columns == 256) return pack.chunk == 64 ? run_op<Number, 256, 64>(pack, p) : run_op<Number, 256, 32>(pack, p);
    if (pack.chunk == 32) return run_op<Number, 128, 32>(pack, p);
  }
  return run_op<Number, 128, 64>(pack, p);
}

std::size_t packed_bytes(Pack const& p) { return Images(p.op, p.columns, p.hidden, p.chunk, p.gated).bytes() * p.sets; }

// plain.cuh's result, which needs no kernel.
template <class Number>
void run_plain(Pack const& pack, Forward const& p) {
  for (std::int64_t row = 0; row < p.rows; ++row) plain_row<Number>(pack, p, row);
}

// How often a problem of a kernel is judged wrong, or a planted fault in it is not.
template <class Number>
int opinions(Kernel const& kernel, unsigned seed, double& worst) {
  int wrong = 0;
  auto const count = [&](bool fault, std::string const& text, std::string const& said) {
    if (fault == !said.empty()) return;
    ++wrong;
    std::printf("%s: %s\n", text.c_str(), fault ? "a fault was not noticed" : said.c_str());
  };
  Memory memory(std::malloc, std::free);
  Case<Number> problem(kernel, seed, 0, memory);
  Forward const& p = problem.fast;
  run_size<Number>(problem.pack, p);
  run_plain<Number>(problem.pack, problem.plain);
  count(false, problem.text, problem.judge());
  worst = std::fmax(worst, problem.worst);
  auto* const out = static_cast<typename Number::type*>(p.out);
  std::int64_t const size = p.rows * p.features;
  auto const spoiled = [&](std::int64_t at) {
    float const value = Number::load(out[at]);
    auto const before = std::exchange(out[at], Number::round(2.0f * value + std::copysign(32.0f, value)));
    count(true, problem.text, problem.judge());
    out[at] = before;
  };
  spoiled(-1), spoiled(size);
  if (problem.poisoned != p.rows - 1) spoiled(size - 1);
  std::fill(out, out + size, Number::round(0.0f));
  count(true, problem.text, problem.judge());
  return wrong;
}

}  // namespace score

// problems.h and plain.cuh on the emulated kernels, one problem of each: how often a judgement was not as it should be.
extern "C" int second_opinions(unsigned seed, double* worst) {
  using namespace score;
  int wrong = 0;
  *worst = 0.0;
  for (auto const& [columns, chunk] : {std::pair{64, 64}, {128, 64}, {128, 32}, {256, 64}, {256, 32}}) {
    for (Family family : {Family::relu, Family::piecewise, Family::gelu, Family::sigmoidal}) {
      for (int kind = 0; kind < 3; ++kind) {                       // linear, mlp, gated mlp
        Op const op = kind ? Op::mlp : Op::linear;
        Kernel kernel{op, 80, Dtype::float16, columns, kind == 2, family, chunk, 128, 256, 0, 3, false};
        wrong += opinions<Half>(kernel, seed++, *worst);
        kernel.dtype = Dtype::bfloat16;
        wrong += opinions<BFloat16>(kernel, seed++, *worst);
      }
    }
  }
  return wrong;
}

// 0, or 1 if the ring was not kept to its rules. What pack.packed and p.packed are, these see to. With 0 columns it is plain.cuh
// that runs.
extern "C" int forward(score::Pack const* pack, score::Forward const* p) {
  using namespace score;
  bool const half = pack->dtype == Dtype::float16;
  if (pack->columns != 0) return (half ? run_size<Half>(*pack, *p) : run_size<BFloat16>(*pack, *p)) ? 0 : 1;
  half ? run_plain<Half>(*pack, *p) : run_plain<BFloat16>(*pack, *p);
  return 0;
}
extern "C" int backward(score::Pack const* pack, score::Backward const* p) {
  using namespace score;
  return (pack->dtype == Dtype::float16 ? run_size<Half>(*pack, *p) : run_size<BFloat16>(*pack, *p)) ? 0 : 1;
}
