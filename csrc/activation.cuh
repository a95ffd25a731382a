// Activations and their derivatives, on a fragment of the hidden features. One family is one instantiation of a kernel: what a
// family costs in registers is what its dearest member costs, and which member runs is one uniform branch a fragment.
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

SCORE_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}

SCORE_HD float sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, 1.0f + exponential(-x));
#else
  return 1.0f / (1.0f + exponential(-x));
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

// For the gradient: f(i, v, w), v and w being (act, act') of z_i and z_{i+1}, for each pair; at the kinks as PyTorch has it.
template <Family FAMILY, class Number, int N, class F>
SCORE_HD void differentiate(float const (&z)[N], Activation activation, float slope, F f) {
  auto each = [&](auto act) {
    SCORE_UNROLL
    for (int i = 0; i < N; i += 2) f(i, act(z[i]), act(z[i + 1]));
  };
  if constexpr (FAMILY == Family::relu) {
    each([](float x) { return float2{relu(x), x <= 0.0f ? 0.0f : 1.0f}; });
  } else if constexpr (FAMILY == Family::piecewise) {
    if (activation == Activation::relu2) {
      each([](float x) { return float2{relu(x) * relu(x), 2.0f * relu(x)}; });
    } else {
      float const below = activation == Activation::leaky_relu ? slope : 1.0f;
      each([=](float x) { return float2{x < 0.0f ? below * x : x, x <= 0.0f ? below : 1.0f}; });
    }
  } else if constexpr (FAMILY == Family::gelu) {
    each([](float x) {
      float const below = 0.5f * (1.0f + erff(x * 0.70710678f));
      return float2{x * below, fmaf(0.39894228f * x, exponential(-0.5f * x * x), below)};
    });
  } else {
    if (activation == Activation::silu) {
      each([](float x) {
        float const s = sigmoid(x);
        return float2{x * s, s * fmaf(x, 1.0f - s, 1.0f)};
      });
    } else if (activation == Activation::sigmoid) {
      each([](float x) {
        float const s = sigmoid(x);
        return float2{s, s * (1.0f - s)};
      });
    } else if (activation == Activation::tanh) {
      each([](float x) {
        float const t = fast_tanh<Number>(x);
        return float2{t, fmaf(-t, t, 1.0f)};
      });
    } else {
      each([](float x) {
        float const t = fast_tanh<Number>(x * fmaf(0.035677408f * x, x, 0.79788456f)), half = fmaf(0.5f, t, 0.5f);
        return float2{x * half, fmaf(0.5f * x * fmaf(-t, t, 1.0f), fmaf(0.10703222f * x, x, 0.79788456f), half)};
      });
    }
  }
}

}  // namespace score
