// x86's vector instructions; with FF_EMULATED in plain C, by SIMD Everywhere, to test paths that no processor at hand has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FF_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// What SIMD Everywhere 0.7.4 lacks, lane by lane.
template <typename Result, typename Lane, typename Vector, typename Each>
static inline Result ff_each_lane(Vector vector, Each each) {
  Lane from[16];
  std::memcpy(from, &vector, sizeof from);
  decltype(each(from[0])) to[16];
  for (int i = 0; i < 16; i++) to[i] = each(from[i]);
  Result result;
  std::memcpy(&result, to, sizeof result);
  return result;
}
static inline int32_t ff_rounded(float x) {
  return std::fabs(x) < 2147483648.0f ? static_cast<int32_t>(std::lrintf(x)) : INT32_MIN;
}
#define _mm512_srai_epi32(a, count) ff_each_lane<__m512i, int32_t>(a, [&](int32_t x) { return x >> (count); })
#define _mm512_cvtps_epi32(a) ff_each_lane<__m512i, float>(a, ff_rounded)
#define _mm512_cvtepi32_ps(a) ff_each_lane<__m512, int32_t>(a, [](int32_t x) { return static_cast<float>(x); })
#define FF_TARGET(features)
#else
#include <immintrin.h>
#define FF_TARGET(features) __attribute__((target(features)))
#endif
