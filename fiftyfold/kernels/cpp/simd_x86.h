// x86's vector instructions; with FF_EMULATED in plain C, by SIMD Everywhere, to test paths that no processor at hand has.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(FF_EMULATED)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
// Missing from SIMD Everywhere 0.7.4.
#define _mm512_srai_epi32(a, count) ff_srai_epi32(a, count)
static inline __m512i ff_srai_epi32(__m512i a, int count) {
  int32_t lanes[16];
  _mm512_storeu_si512(lanes, a);
  for (int32_t& lane : lanes) lane >>= count;
  return _mm512_loadu_si512(lanes);
}
#define _mm512_cvtps_epi32(a) ff_cvtps_epi32(a)
static inline __m512i ff_cvtps_epi32(__m512 a) {
  float from[16];
  int32_t lanes[16];
  _mm512_storeu_ps(from, a);
  for (int i = 0; i < 16; i++) {
    lanes[i] = std::fabs(from[i]) < 2147483648.0f ? static_cast<int32_t>(std::lrintf(from[i])) : INT32_MIN;
  }
  return _mm512_loadu_si512(lanes);
}
#define _mm512_cvtepi32_ps(a) ff_cvtepi32_ps(a)
static inline __m512 ff_cvtepi32_ps(__m512i a) {
  int32_t from[16];
  float lanes[16];
  _mm512_storeu_si512(from, a);
  for (int i = 0; i < 16; i++) lanes[i] = static_cast<float>(from[i]);
  return _mm512_loadu_ps(lanes);
}
#define FF_TARGET(features)
#else
#include <immintrin.h>
#define FF_TARGET(features) __attribute__((target(features)))
#endif
