// The kernels of this build. Each .cu adds those that it instantiates; bindings.cpp picks one for a call.
#pragma once
#include <cstddef>
#include <vector>

#include "params.h"

namespace score {

// Activations that are compiled together: see activation.cuh.
enum class Family { relu, piecewise, gelu, sigmoidal };
Family family(Activation activation);

struct Kernel {
  Op op;
  int arch;                        // 80 or 90: the least compute capability, and for 90 the only one, that runs it
  Dtype dtype;
  int columns;                     // D padded
  bool gated;
  Family family;
  int chunk;                       // hidden features (for linear: columns of the result) at a time
  int rows;                        // of a tile, which one block works on
  int threads;                     // of a block
  int shared;                      // bytes of shared memory of a block
  int stages;                      // chunks of weights that the shared memory holds: all of them stay, if there are no more
  bool accumulates;                // of backward: a block keeps the gradients of one set of weights, for H of `columns`, padded
  // The pass that it is for is the one that is not null. They return a cudaError_t.
  int (*forward)(Forward const&, int multiprocessors, CUstream_st*) = nullptr;
  int (*backward)(Backward const&, int multiprocessors, CUstream_st*) = nullptr;
};

// In order of registration.
std::vector<Kernel>& kernels();

// Bytes of the weights of all sets, as Pack writes them.
std::size_t packed_bytes(Pack const& pack);

// Writes pack.packed; returns a cudaError_t.
int launch_pack(Pack const& pack, CUstream_st* stream);

}  // namespace score
