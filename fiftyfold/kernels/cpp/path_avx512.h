// Products with AVX512-VNNI: four products added to 32 bits in each of sixteen lanes (`vpdpbusd`).
//
// Weights are unpacked in registers, by vector pipes that the products leave free.
#pragma once
#include "products.h"
#include "simd_x86.h"

namespace fiftyfold {
namespace avx512 {

#define FF_AVX512 FF_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")

FF_DEFINE_FINISH(FF_AVX512)

// In assembly, because GCC 12 otherwise moves accumulators from register to register, at a loss of 40 %.
FF_AVX512 static FF_INLINE void add_products_of(__m512i& sums, __m512i stored, __m512i codes) {
#if defined(FF_EMULATED)
  sums = _mm512_dpbusd_epi32(sums, stored, codes);
#else
  asm("vpdpbusd %[codes], %[stored], %[sums]" : [sums] "+v"(sums) : [stored] "v"(stored), [codes] "v"(codes));
#endif
}

FF_AVX512 static FF_INLINE __m512i four_codes(const int8_t* x) {
  int32_t codes;
  std::memcpy(&codes, x, sizeof codes);
  return _mm512_set1_epi32(codes);
}

// ROWS rows times BLOCKS blocks side by side, one group of inputs: sums (rows x 64).
template <int BITS, int ROWS, int BLOCKS>
FF_AVX512 static FF_INLINE void multiply_rows(
    const int8_t* x, int64_t stride, const uint8_t* weight, int64_t blocks, int32_t* sums) {
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
  __m512i total[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) total[row][b] = _mm512_setzero_si512();
  }
  for (int64_t block = 0; block < blocks; block++) {
    __m512i packed[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) packed[b] = _mm512_loadu_si512(weight + (block * BLOCKS + b) * kBlockBytes);
    const int8_t* codes = x + block * (32 / BITS);
#pragma GCC unroll 8
    for (int part = 0; part < 8 / BITS; part++) {
      __m512i stored[BLOCKS];
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; b++) {
        stored[b] = _mm512_and_si512(part ? _mm512_srli_epi16(packed[b], BITS * part) : packed[b], mask);
      }
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; row++) {
        const __m512i four = four_codes(codes + row * stride + 4 * part);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) add_products_of(total[row][b], stored[b], four);
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      _mm512_storeu_si512(sums + row * kUnitOutputs + b * kBlockOutputs, total[row][b]);
    }
  }
}

// One row. Codes stay where they are in their byte and count 2**(BITS * place) times, so that hardly any shift is
// needed; the sums of each place are divided once, at the end, without a remainder.
template <int BITS, int BLOCKS>
FF_AVX512 static FF_INLINE void multiply_row(const int8_t* x, const uint8_t* weight, int64_t blocks, int32_t* sums) {
  constexpr int kPlaces = 4, kHalves = 2 / BITS, kAhead = 2048;
  __m512i mask[kPlaces], total[BLOCKS][kPlaces];
#pragma GCC unroll 4
  for (int place = 0; place < kPlaces; place++) {
    mask[place] = _mm512_set1_epi8(static_cast<char>(((1 << BITS) - 1) << (BITS * place)));
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) total[b][place] = _mm512_setzero_si512();
  }
  for (int64_t block = 0; block < blocks; block++) {
    __m512i packed[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      const uint8_t* from = weight + (block * BLOCKS + b) * kBlockBytes;
      packed[b] = _mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int half = 0; half < kHalves; half++) {
      if (half) {
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) packed[b] = _mm512_srli_epi16(packed[b], 4);
      }
#pragma GCC unroll 4
      for (int place = 0; place < kPlaces; place++) {
        const __m512i four = four_codes(x + block * (32 / BITS) + 16 * half + 4 * place);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) {
          add_products_of(total[b][place], _mm512_and_si512(packed[b], mask[place]), four);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < BLOCKS; b++) {
    __m512i sum = total[b][0];
#pragma GCC unroll 4
    for (int place = 1; place < kPlaces; place++) {
      sum = _mm512_add_epi32(sum, _mm512_srai_epi32(total[b][place], BITS * place));
    }
    _mm512_storeu_si512(sums + b * kBlockOutputs, sum);
  }
}

template <int BITS, int BLOCKS>
FF_AVX512 static FF_INLINE void multiply_some(
    int64_t rows, const int8_t* x, int64_t stride, const uint8_t* weight, int64_t blocks, int32_t* sums) {
  switch (rows) {
    case 6: return multiply_rows<BITS, 6, BLOCKS>(x, stride, weight, blocks, sums);
    case 5: return multiply_rows<BITS, 5, BLOCKS>(x, stride, weight, blocks, sums);
    case 4: return multiply_rows<BITS, 4, BLOCKS>(x, stride, weight, blocks, sums);
    case 3: return multiply_rows<BITS, 3, BLOCKS>(x, stride, weight, blocks, sums);
    case 2: return multiply_rows<BITS, 2, BLOCKS>(x, stride, weight, blocks, sums);
    default: return multiply_row<BITS, BLOCKS>(x, weight, blocks, sums);
  }
}

// Cuts rows into tiles of 6, and the last of them into two of nearly equal size rather than a full and a small one.
static FF_INLINE int64_t tile_rows(int64_t left, int planes) {
  if (left >= 12 || left <= 6) return least(left, 6);
  return planes == 2 ? (left > 8 ? 6 : 4) : (left + 1) / 2;
}

template <int BITS, int BLOCKS>
FF_AVX512 static void multiply_unit(const UnitWork& work) {
  int32_t sums[6 * kUnitOutputs];
  for (int64_t group = 0; group < work.groups; group++) {
    const uint8_t* weight = work.weight + group * work.group_blocks * BLOCKS * kBlockBytes;
    const int8_t* x = work.codes + group * work.group_blocks * (32 / BITS);
    for (int64_t row = 0; row < work.rows;) {
      const int64_t rows = tile_rows(work.rows - row, work.planes);
      multiply_some<BITS, BLOCKS>(rows, x + row * work.stride, work.stride, weight, work.group_blocks, sums);
      finish(work, sums, kUnitOutputs, row, rows, 0, work.outputs, group);
      row += rows;
    }
  }
}

template <int BITS>
FF_AVX512 static void multiply(const UnitWork& work) {
  work.blocks == kUnitBlocks ? multiply_unit<BITS, kUnitBlocks>(work) : multiply_unit<BITS, 1>(work);
}

FF_DEFINE_QUANTIZE(FF_AVX512)

FF_AVX512 static int64_t spin(int64_t rounds) {
  constexpr int kSums = 16;
  __m512i sums[kSums];
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 16
  for (int i = 0; i < kSums; i++) sums[i] = _mm512_setzero_si512();
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; i++) add_products_of(sums[i], ones, ones);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kSums; i++) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  int32_t sink[16];
  _mm512_storeu_si512(sink, sums[0]);
  // One operation less for a sum that cannot be, so that the compiler must compute it.
  return rounds * kSums * 128 - (sink[0] == -12345);
}

#undef FF_AVX512

static const Path kPath{"avx512", 96, quantize, {multiply<1>, multiply<2>}, spin};

}  // namespace avx512
}  // namespace fiftyfold
