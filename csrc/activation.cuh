// Activations, in place on a fragment of the hidden features. One family is one instantiation of a kernel: what a family costs in
// registers is what its dearest member costs, and which member runs is one uniform branch a fragment.
#pragma once
#include "kernels.h"
#include "numbers.cuh"

namespace score {

SCORE_HD float relu(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));  // one instruction, and NaN is not hidden
  return y;
#else
  return x < 0.0f ? 0.0f : x;
#endif
}

SCORE_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + std::exp(-x));
#endif
}

// bfloat16 has 8 bits: the instruction's 11 are enough for it. float16 has 11: there it is 2 sigmoid(2x) - 1.
template <class Number>
SCORE_HD float fast_tanh(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (Number::dtype == Dtype::bfloat16) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#endif
  return fmaf(2.0f, sigmoid(2.0f * x), -1.0f);
}

template <int N, class F>
SCORE_HD void each(float (&u)[N], F f) {
  SCORE_UNROLL
  for (int i = 0; i < N; ++i) u[i] = f(u[i]);
}

template <Family FAMILY, class Number, int N>
SCORE_HD void activate(float (&u)[N], Activation activation, float slope) {
  if constexpr (FAMILY == Family::relu) {
    each(u, [](float x) { return relu(x); });
  } else if constexpr (FAMILY == Family::piecewise) {
    if (activation == Activation::relu2) {
      each(u, [](float x) { return relu(x) * relu(x); });
    } else if (activation == Activation::leaky_relu) {
      each(u, [=](float x) { return x < 0.0f ? slope * x : x; });
    }
  } else if constexpr (FAMILY == Family::gelu) {
    each(u, [](float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); });
  } else {
    if (activation == Activation::silu) {
      each(u, [](float x) { return x * sigmoid(x); });
    } else if (activation == Activation::sigmoid) {
      each(u, [](float x) { return sigmoid(x); });
    } else if (activation == Activation::tanh) {
      each(u, [](float x) { return fast_tanh<Number>(x); });
    } else {
      each(u, [](float x) { return 0.5f * x * (1.0f + fast_tanh<Number>(x * fmaf(0.035677408f * x, x, 0.79788456f))); });
    }
  }
}

}  // namespace score
