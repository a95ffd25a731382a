// Adds kernels to the build: every dtype and family of activations for one op, width and architecture.
#pragma once
#include "forward.cuh"

namespace score {

template <class C>
Kernel describe() {
  using Arch = typename C::Arch;
  return {C::kOp, Arch::kArch, C::Number::dtype, C::kColumns, C::kGated, C::kFamily, C::kChunk, 64 * Arch::kGroups,
          Arch::kThreads, Arch::kSharedBytes, Arch::kStages, Arch::launch};
}

template <template <class> class ARCH, Op OP, int COLUMNS, int CHUNK, bool GATED, class NUMBER>
void add_number() {
  auto add = [](Kernel const& kernel) { kernels().push_back(kernel); };
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::relu>>());
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::piecewise>>());
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::gelu>>());
  add(describe<Config<ARCH, OP, NUMBER, COLUMNS, CHUNK, GATED, Family::sigmoidal>>());
}

template <template <class> class ARCH, Op OP, int COLUMNS, int CHUNK, bool GATED = false>
bool add() {
  add_number<ARCH, OP, COLUMNS, CHUNK, GATED, Half>();
  add_number<ARCH, OP, COLUMNS, CHUNK, GATED, BFloat16>();
  return true;
}

}  // namespace score
