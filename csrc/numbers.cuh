// 16-bit numbers, two to a register, and the arithmetic that differs between a GPU and a host that emulates one.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

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

SCORE_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / std::sqrt(x);
#endif
}

}  // namespace score
