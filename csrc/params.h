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

// Weights of all sets as the kernels read them: see weights.cuh. One small launch writes them, before every launch.
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

// What every pass is given. Pointers are to device memory. z = r_t h + s_t x0, then h <- q_t z + w_t F(z), t = 0 ... T-1.
struct Call {
  std::int64_t rows;
  int features, hidden, iterations, sets;
  int first;                       // the first iteration that gradients reach, from which on states are kept
  bool cyclic;                     // iteration t uses set t mod L, not floor(t L / T)
  Norm norm;
  Activation activation;
  float negative_slope, eps;
  void const* x0;                  // (rows, D) or null
  float const* coefficients;       // (T, 5): p, q, v, w, e of score_kernels/stages.py, of which q and w are read
  float const* state_scale;        // (T) or null
  float const* x0_scale;           // (T) or null
  void const* packed;              // what Pack wrote
};

// h_T of all rows.
struct Forward : Call {
  void const* h;                   // (rows, D); out may be h itself
  void* out;                       // (rows, D)
  float* states;                   // (T+1-first, rows, D): h_first ... h_T, or null
};

// The gradients of these rows, from their states, for the iterations t = T-1 ... first; where that is not 0, dL/dh is 0.
// Those of the parameters are sums over rows: products of what the ring is left with, as
// score_kernels/triton_kernels/ring.py makes them.
struct Backward : Call {
  std::int64_t states_rows;        // rows from one state to the next
  std::int64_t grad_rows;          // rows from one dL/dh_t to the next
  float const* states;             // h_first, h_first+1 ... h_T-1, each (rows, D)
  void const* grad_out;            // dL/dh_T (rows, D)
  float const* grad_states;        // dL/dh_0 ... dL/dh_T of a trajectory, each (rows, D), or null
  void* grad_h;                    // (rows, D)
  float* grad_x0;                  // (rows, D), or null
  float* scalars;                  // (T-first, 7, rows), or null: row by row dL/dp, dq, dv, dw, de, of which dv and de are left
                                   // alone, then of state_scale and x0_scale, left alone where these are null
  void* ring;                      // or null: fields one after the other, each (T-first, rows, width), of 16 bits:
                                   //   mlp     n (D), g (D), w u (H), dz (H) and, if gated, dgate (H)
                                   //   linear  n (D), da (D)
                                   // n is the normed state without gain and bias, g is dL/dh_t+1, dz holds the factor w
  // Instead of the ring, of kernels that accumulate; then L = 1 and H is padded as D is.
  int blocks;                      // the most that the launch may have
  float* partials;                 // (blocks, 2, columns + 4, columns), to which each block adds what it has of dz^T n and of
                                   // (w u)^T g, and below these, in four parts, of the sums of dz and of w g over rows
};

}  // namespace score
