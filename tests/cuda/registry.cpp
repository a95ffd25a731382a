// Every kernel that registered itself is one that can be chosen, and no choice is ambiguous.
#include <cstdio>
#include <set>
#include <tuple>

#include "kernels.h"

int main() {
  using namespace score;
  std::set<std::tuple<Op, int, Dtype, int, bool, Family, int, int>> seen;
  int failures = 0;
  for (Kernel const& k : kernels()) {
    bool const distinct = seen.emplace(k.op, k.arch, k.dtype, k.columns, k.gated, k.family, k.chunk, k.rows).second;
    bool const sane = k.launch != nullptr && (k.arch == 80 || k.arch == 90) && k.columns > 0 && k.chunk > 0 && k.rows > 0 &&
                      k.threads > 0 && k.threads <= 1024 && k.shared >= 0 && k.shared <= 227 << 10 && k.stages > 0 &&
                      !(k.op == Op::linear && k.gated);
    if (!distinct || !sane) {
      std::printf("op %d, sm_%d, dtype %d, %d columns, family %d: %s\n", int(k.op), k.arch, int(k.dtype), k.columns,
                  int(k.family), distinct ? "senseless numbers" : "registered twice");
      ++failures;
    }
  }
  std::printf("%zu kernels\n", kernels().size());
  return failures != 0 || kernels().empty();
}
