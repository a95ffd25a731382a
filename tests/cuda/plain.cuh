// The forward pass of one row in plain loops of float32, as csrc/params.h and the formulas read: a second opinion on the
// kernels. Of csrc it takes the interface and the 16-bit numbers, and reads the weights where the caller has them. It rounds
// where the kernels do: the normed state, and for mlp w times the hidden features.
#pragma once
#include "kernels.h"
#include "numbers.cuh"

namespace score {

constexpr int kWidest = 512;                                       // D that it has room for

SCORE_HD float plain_activation(Activation activation, float x, float slope) {
  switch (activation) {
    case Activation::identity: return x;
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    case Activation::relu2: return x < 0.0f ? 0.0f : x * x;
    case Activation::leaky_relu: return x < 0.0f ? slope * x : x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(0.70710678f * x));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::tanh: return tanhf(x);
    case Activation::sigmoid: break;
  }
  return 1.0f / (1.0f + expf(-x));
}

// A parameter of one set, which may not be given.
struct Parameter {
  void const* at;
  float otherwise;

  template <class Number>
  SCORE_HD float of(std::int64_t i) const {
    return at == nullptr ? otherwise : Number::load(static_cast<typename Number::type const*>(at)[i]);
  }
};

// x <- norm(y) of n features, not yet rounded.
template <class Number>
SCORE_HD void plain_norm(Pack const& pack, Forward const& p, float const* y, Parameter gain, Parameter bias, float* x) {
  int const n = p.features;
  float mean = 0.0f, variance = 0.0f;
  if (p.norm == Norm::layernorm) {
    for (int i = 0; i < n; ++i) mean += y[i];
    mean /= float(n);
  }
  for (int i = 0; i < n; ++i) variance += (y[i] - mean) * (y[i] - mean);
  float const deviation = sqrtf(variance / float(n) + p.eps);
  for (int i = 0; i < n; ++i) {
    float g = gain.otherwise, b = bias.otherwise;
    if (gain.at != nullptr) g = pack.norm_float32 ? static_cast<float const*>(gain.at)[i] : gain.of<Number>(i);
    if (bias.at != nullptr) b = pack.norm_float32 ? static_cast<float const*>(bias.at)[i] : bias.of<Number>(i);
    x[i] = (y[i] - mean) / deviation * g + b;
  }
}

template <class Number>
SCORE_HD void plain_row(Pack const& pack, Forward const& p, std::int64_t row) {
  using T = typename Number::type;
  int const n = p.features;
  bool const linear = pack.op == Op::linear;
  auto const product = [&](Parameter weight, Parameter bias, int j, float const* x) {
    float sum = bias.of<Number>(j);
    for (int i = 0; i < n; ++i) sum += x[i] * weight.of<Number>(std::int64_t(j) * n + i);
    return sum;
  };
  float y[kWidest], x[kWidest];
  for (int i = 0; i < n; ++i) y[i] = Number::load(static_cast<T const*>(p.h)[row * n + i]);
  for (int t = 0; t <= p.iterations; ++t) {
    if (p.states != nullptr && t >= p.first)
      for (int i = 0; i < n; ++i) p.states[((t - p.first) * p.rows + row) * n + i] = y[i];
    if (t == p.iterations) break;
    float const q = p.coefficients[5 * t + 1], w = p.coefficients[5 * t + 3];
    for (int i = 0; i < n; ++i) {
      if (p.state_scale != nullptr) y[i] *= p.state_scale[t];
      if (p.x0 != nullptr)
        y[i] += (p.x0_scale == nullptr ? 1.0f : p.x0_scale[t]) * Number::load(static_cast<T const*>(p.x0)[row * n + i]);
      x[i] = y[i];
    }
    // The parameters of this iteration, in the order of SHAPES in score_kernels/problem.py.
    std::int64_t const set = p.cyclic ? t % p.sets : std::int64_t(t) * p.sets / p.iterations;
    auto const parameter = [&](int column, float otherwise) {
      return Parameter{reinterpret_cast<void const*>(pack.table[set * (linear ? 4 : 8) + column]), otherwise};
    };
    Parameter const weight = parameter(0, 0.0f), bias = parameter(1, 0.0f);
    if (p.norm != Norm::none)
      plain_norm<Number>(pack, p, y, parameter(linear ? 2 : 6, 1.0f), parameter(linear ? 3 : 7, 0.0f), x);
    for (int i = 0; i < n; ++i) x[i] = Number::load(Number::round(x[i]));
    if (linear) {
      for (int i = 0; i < n; ++i)
        y[i] = q * y[i] + w * plain_activation(p.activation, product(weight, bias, i, x), p.negative_slope);
      continue;
    }
    Parameter const out = parameter(2, 0.0f), out_bias = parameter(3, 0.0f);
    Parameter const gate = parameter(4, 0.0f), gate_bias = parameter(5, 0.0f);
    for (int i = 0; i < n; ++i) y[i] = q * y[i] + w * out_bias.of<Number>(i);
    for (int j = 0; j < p.hidden; ++j) {
      float u = product(weight, bias, j, x);
      if (pack.gated)
        u *= plain_activation(p.activation, product(gate, gate_bias, j, x), p.negative_slope);
      else
        u = plain_activation(p.activation, u, p.negative_slope);
      float const v = Number::load(Number::round(w * u));
      for (int i = 0; i < n; ++i) y[i] += v * out.of<Number>(std::int64_t(i) * p.hidden + j);
    }
  }
  for (int i = 0; i < n; ++i) static_cast<T*>(p.out)[row * n + i] = Number::round(y[i]);
}

}  // namespace score
