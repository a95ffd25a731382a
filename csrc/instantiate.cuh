// Adds kernels to the build: every dtype and family of activations for one pass, op, width and architecture.
#pragma once
#include <type_traits>

#include "iterate.cuh"

namespace score {

template <class C>
Kernel describe() {
  using Arch = typename C::Arch;
  Kernel kernel{C::kOp, Arch::kArch, C::Number::dtype, C::kColumns, C::kGated, C::kFamily, C::kChunk, 64 * Arch::kGroups,
                Arch::kThreads, Arch::kSharedBytes, Arch::kStages, C::kAccumulates};
  if constexpr (std::is_same_v<typename C::Params, Forward>)
    kernel.forward = Arch::launch;
  else
    kernel.backward = Arch::launch;
  return kernel;
}

template <template <class> class ARCH, Op OP, int COLUMNS, int CHUNK, bool GATED, class PARAMS, bool ACCUMULATES, class NUMBER>
void add_number() {
  auto add = [](Kernel const& kernel) { kernels().push_back(kernel); };
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::relu, PARAMS, ACCUMULATES>>());
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::piecewise, PARAMS, ACCUMULATES>>());
  if constexpr (!ACCUMULATES || COLUMNS <= 64)                     // else it spills 4 bytes
    add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::gelu, PARAMS, ACCUMULATES>>());
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::sigmoidal, PARAMS, ACCUMULATES>>());
}

template <template <class> class ARCH, Op OP, int COLUMNS, int CHUNK, bool GATED = false, class PARAMS = Forward,
          bool ACCUMULATES = false>
bool add() {
  add_number<ARCH, OP, COLUMNS, CHUNK, GATED, PARAMS, ACCUMULATES, Half>();
  add_number<ARCH, OP, COLUMNS, CHUNK, GATED, PARAMS, ACCUMULATES, BFloat16>();
  return true;
}

}  // namespace score
