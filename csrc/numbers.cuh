// Numbers as memory has them, two of 16 bits to a register, and the arithmetic that differs between a GPU and a host that
// emulates one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.h"

#if defined(__CUDACC__)
#define SCORE_HD __host__ __device__ __forceinline__
#define SCORE_UNROLL _Pragma("unroll")
#define SCORE_NO_UNROLL _Pragma("unroll 1")
#else
#define SCORE_HD inline
#define SCORE_UNROLL
#define SCORE_NO_UNROLL
#endif

namespace score {

struct Half {
  using type = __half;
  using Pair = std::uint32_t;
  static constexpr Dtype dtype = Dtype::float16;
  static SCORE_HD float load(type x) { return __half2float(x); }
  static SCORE_HD type round(float x) { return __float2half_rn(x); }
  static SCORE_HD std::uint32_t pack(float a, float b) {
    __half2 v = __floats2half2_rn(a, b);
    std::uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
  }
  static SCORE_HD float2 unpack(std::uint32_t bits) {
    __half2 v;
    memcpy(&v, &bits, 4);
    return __half22float2(v);
  }
};

struct BFloat16 {
  using type = __nv_bfloat16;
  using Pair = std::uint32_t;
  static constexpr Dtype dtype = Dtype::bfloat16;
  static SCORE_HD float load(type x) { return __bfloat162float(x); }
  static SCORE_HD type round(float x) { return __float2bfloat16_rn(x); }
  static SCORE_HD std::uint32_t pack(float a, float b) {
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    std::uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
  }
  static SCORE_HD float2 unpack(std::uint32_t bits) {
    __nv_bfloat162 v;
    memcpy(&v, &bits, 4);
    return __bfloat1622float2(v);
  }
};

// What is computed from a value from here on is not taken from what was computed from it before, and kept in registers.
template <class T>
SCORE_HD void forget(T& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(value));
  else if constexpr (std::is_integral_v<T>)
    asm volatile("" : "+r"(value));
  else
    asm volatile("" : "+f"(value));
#endif
}

struct Float32 {
  using type = float;
  using Pair = float2;
  static SCORE_HD float load(type x) { return x; }
  static SCORE_HD type round(float x) { return x; }
  static SCORE_HD Pair pack(float a, float b) { return float2{a, b}; }
  static SCORE_HD float2 unpack(Pair pair) { return pair; }
};

SCORE_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

}  // namespace score
