// x86's vector instructions; with FF_EMULATED in plain C, by SIMD Everywhere, to test paths that no processor at hand has.
#pragma once
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
#define FF_TARGET(features)
#else
#include <immintrin.h>
#define FF_TARGET(features) __attribute__((target(features)))
#endif
