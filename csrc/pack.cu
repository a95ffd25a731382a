// Fills the images of weights.cuh.
#include <cuda_runtime.h>

#include "kernels.h"
#include "weights.cuh"

namespace score {
namespace {

constexpr int kThreads = 256;

template <class Number>
__global__ __launch_bounds__(kThreads) void pack_kernel(Pack const p) {
  Images const images(p.op, p.columns, p.hidden, p.chunk, p.gated);
  int const groups = images.chunks * (images.item() / 8), units = groups + images.floats();
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < std::int64_t(units) * p.sets;
       i += std::int64_t(gridDim.x) * kThreads) {
    int const set = static_cast<int>(i / units), at = static_cast<int>(i % units);
    if (at < groups)
      pack_group<Number>(p, images, set, at);
    else
      pack_float<Number>(p, images, set, at - groups);
  }
}

}  // namespace

std::size_t packed_bytes(Pack const& p) {
  return Images(p.op, p.columns, p.hidden, p.chunk, p.gated).bytes() * p.sets;
}

int launch_pack(Pack const& p, CUstream_st* stream) {
  Images const images(p.op, p.columns, p.hidden, p.chunk, p.gated);
  std::int64_t const units = (std::int64_t(images.chunks) * (images.item() / 8) + images.floats()) * p.sets;
  std::int64_t const wanted = (units + kThreads - 1) / kThreads;
  int const blocks = static_cast<int>(wanted < (1 << 16) ? wanted : 1 << 16);
  if (p.dtype == Dtype::float16)
    pack_kernel<Half><<<blocks, kThreads, 0, stream>>>(p);
  else
    pack_kernel<BFloat16><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace score
