// What the host hands to the kernels. Plain data: no torch, no Python, no CUDA type but the stream.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace score {

enum class Op { linear, mlp };
enum class Dtype { float16, bfloat16 };
enum class Norm { none, layernorm, rmsnorm };

// The order is that of ACTIVATIONS in score_kernels/activations.py.
enum class Activation { identity, relu, relu2, leaky_relu, gelu, gelu_tanh, silu, tanh, sigmoid };

// Weights of all sets as the kernels read them: see weights.cuh. One small launch writes them, before every forward launch.
struct Pack {
  Op op;
  Dtype dtype;
  int features, hidden, sets;      // D, H (D for linear), L
  int columns, chunk;              // of the kernel that will read them
  bool gated;
  bool norm_float32;               // the norm's gain and bias are float32, not `dtype`
  std::int64_t const* table;       // on the device: addresses (L, parameters), 0 where a parameter is not given
  void* packed;                    // packed_bytes() of scratch on the device
};

// h_T of all rows: z = r_t h + s_t x0, then h <- q_t z + w_t F(z), for t = 0 ... T-1. Pointers are to device memory.
struct Forward {
  std::int64_t rows;
  int features, hidden, iterations, sets;
  bool cyclic;                     // iteration t uses set t mod L, not floor(t L / T)
  Norm norm;
  Activation activation;
  float negative_slope, eps;
  void const* h;                   // (rows, D); out may be h itself
  void const* x0;                  // (rows, D) or null
  void* out;                       // (rows, D)
  float* states;                   // (T+1, rows, D), every h_t, or null
  float const* coefficients;       // (T, 5): p, q, v, w, e of score_kernels/stages.py, of which q and w are read
  float const* state_scale;        // (T) or null
  float const* x0_scale;           // (T) or null
  void const* packed;              // what Pack wrote
};

}  // namespace score
