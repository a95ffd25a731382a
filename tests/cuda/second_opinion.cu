// Every kernel of this build that the GPU runs, on random odd problems, against plain.cuh on the same GPU. Without a GPU it
// says so and ends with kSkipped, which ctest counts as skipped.
#include <cuda_runtime.h>

#include <cstdio>

#include "problems.h"

namespace score {
namespace {

constexpr int kSkipped = 77, kProblems = 24;

template <class Number>
__global__ void plain_kernel(Pack const pack, Forward const p) {
  std::int64_t const row = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < p.rows) plain_row<Number>(pack, p, row);
}

void* take(std::size_t bytes) {
  void* memory = nullptr;
  return cudaMallocManaged(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
void give(void* memory) { cudaFree(memory); }

// What the kernel makes of a problem twice, the same bits each time, and plain.cuh once: nothing, or what is wrong.
template <class Number>
std::string judged(Kernel const& kernel, unsigned seed, std::int64_t rows, int multiprocessors, double& worst) {
  Memory memory(take, give);
  Case<Number> problem(kernel, seed, rows, memory);
  Forward& p = problem.fast;
  std::size_t const bytes = p.rows * p.features * sizeof(typename Number::type);
  std::vector<char> const given(static_cast<char const*>(p.h), static_cast<char const*>(p.h) + bytes);
  std::vector<char> first;
  plain_kernel<Number><<<static_cast<unsigned>((p.rows + 63) / 64), 64>>>(problem.pack, problem.plain);
  for (int run = 0; run < 2; ++run) {
    int error = launch_pack(problem.pack, nullptr);
    if (error == cudaSuccess) error = kernel.forward(p, multiprocessors, nullptr);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return problem.text + ": CUDA: " + cudaGetErrorString(static_cast<cudaError_t>(error));
    char const* const out = static_cast<char const*>(p.out);
    if (run == 1 && std::memcmp(first.data(), out, bytes) != 0) return problem.text + ": other bits when called again";
    first.assign(out, out + bytes);
    if (run == 0 && p.h == p.out) std::memcpy(p.out, given.data(), bytes);
  }
  std::string const said = problem.judge();
  worst = std::fmax(worst, problem.worst);
  return said.empty() ? said : problem.text + ": " + said;
}

int run() {
  int devices = 0, device = 0, major = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) error = cudaGetDevice(&device);
  if (error != cudaSuccess || devices == 0) {
    std::printf("the second opinion did not run: %s\n", error != cudaSuccess ? cudaGetErrorString(error) : "there is no GPU");
    return kSkipped;
  }
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int ran = 0, wrong = 0;
  for (Kernel const& k : kernels()) {
    if (k.forward == nullptr || (k.arch == 90 ? major != 9 : major < 8)) continue;
    std::printf("sm_%d op %d, dtype %d, %d columns, chunks of %d, gated %d, family %d: ", k.arch, int(k.op), int(k.dtype),
                k.columns, k.chunk, k.gated, int(k.family));
    std::fflush(stdout);                                           // where it hangs is known
    ++ran;
    double worst = 0.0;
    std::string said;
    for (unsigned problem = 0; problem < kProblems && said.empty(); ++problem) {
      // The first has several tiles for some blocks, one for others, and a ragged one.
      std::int64_t const rows = problem == 0 ? (2 * multiprocessors - 3) * std::int64_t(k.rows) + 5 : 0;
      unsigned const seed = kProblems * static_cast<unsigned>(&k - kernels().data()) + problem;
      said = k.dtype == Dtype::float16 ? judged<Half>(k, seed, rows, multiprocessors, worst)
                                       : judged<BFloat16>(k, seed, rows, multiprocessors, worst);
    }
    wrong += !said.empty();
    std::printf("%s, largest error %.2f of what is allowed\n", said.empty() ? "right" : said.c_str(), worst);
    if (cudaGetLastError() != cudaSuccess && cudaDeviceSynchronize() != cudaSuccess) break;    // nothing runs after such an error
  }
  if (ran == 0) {
    std::printf("the second opinion did not run: no kernel of this build is for compute capability %d.x\n", major);
    return kSkipped;
  }
  std::printf("%d kernels, %d of them wrong\n", ran, wrong);
  return wrong != 0;
}

}  // namespace
}  // namespace score

int main() { return score::run(); }
