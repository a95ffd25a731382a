// Every kernel that registered itself is one that can be chosen, and no choice is ambiguous. Prints them, for registered.cmake.
#include <cstdio>
#include <set>
#include <tuple>

#include "kernels.h"

int main() {
  using namespace score;
  std::set<std::tuple<bool, Op, int, Dtype, int, bool, Family, int, int, bool>> seen;
  int failures = 0;
  for (Kernel const& k : kernels()) {
    bool const forward = k.forward != nullptr;
    char const* const number = k.dtype == Dtype::float16 ? "Half" : "BFloat16";
    std::printf("sm_%d %d %s %d %d %d %d %s %d: %d threads, %d rows, %d bytes\n", k.arch, int(k.op), number, k.columns,
                k.chunk, k.gated, int(k.family), forward ? "Forward" : "Backward", k.accumulates, k.threads, k.rows, k.shared);
    bool const distinct =
        seen.emplace(forward, k.op, k.arch, k.dtype, k.columns, k.gated, k.family, k.chunk, k.rows, k.accumulates).second;
    bool const sane = forward != (k.backward != nullptr) && (k.arch == 80 || k.arch == 90) && k.columns > 0 && k.chunk > 0 &&
                      k.rows > 0 && k.threads > 0 && k.threads <= 1024 && k.shared >= 0 && k.shared <= 227 << 10 &&
                      k.stages > 0 && !(k.op == Op::linear && k.gated) &&
                      !(k.accumulates && (forward || k.op != Op::mlp || k.gated));
    if (!distinct || !sane) {
      std::printf("op %d, sm_%d, dtype %d, %d columns, family %d: %s\n", int(k.op), k.arch, int(k.dtype), k.columns,
                  int(k.family), distinct ? "senseless numbers" : "registered twice");
      ++failures;
    }
  }
  std::printf("%zu kernels\n", kernels().size());
  return failures != 0 || kernels().empty();
}
