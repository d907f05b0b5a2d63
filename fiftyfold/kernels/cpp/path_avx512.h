// Products with AVX512-VNNI: four products added to 32 bits in each of sixteen lanes (`vpdpbusd`).
//
// Weights are unpacked in registers, by vector pipes that the products leave free on AMD's processors. Intel's have
// none to spare: for many rows, weights are unpacked there once, into a *panel* in the caches.
#pragma once
#if defined(__x86_64__) && !defined(FF_EMULATED)
#include <cpuid.h>
#endif

#include "products.h"
#include "scratch.h"
#include "simd_x86.h"

namespace fiftyfold {
namespace avx512 {

#define FF_AVX512 FF_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,prefer-vector-width=512")

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

// Unpacks one group's weights of COUNT blocks, of BLOCKS side by side, into operands of 64 bytes, four inputs each:
// those of a block `operand` bytes apart, those of its neighbour `column` bytes further on.
template <int BITS, int BLOCKS, int COUNT>
FF_AVX512 static void unpack(
    const uint8_t* weight, int64_t blocks, int64_t operand, int64_t column, uint8_t* panel) {
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
  for (int64_t block = 0; block < blocks; block++) {
#pragma GCC unroll 4
    for (int b = 0; b < COUNT; b++) {
      const __m512i packed = _mm512_loadu_si512(weight + (block * BLOCKS + b) * kBlockBytes);
      uint8_t* to = panel + b * column + block * (8 / BITS) * operand;
#pragma GCC unroll 8
      for (int part = 0; part < 8 / BITS; part++) {
        const __m512i stored = _mm512_and_si512(part ? _mm512_srli_epi16(packed, BITS * part) : packed, mask);
        _mm512_storeu_si512(to + part * operand, stored);
      }
    }
  }
}

// Where this thread unpacks.
static inline uint8_t* panel_of(int64_t bytes) {
  static thread_local Scratch scratch;
  return scratch.reserve(static_cast<size_t>(bytes));
}

template <int ROWS, int BLOCKS>
FF_AVX512 static FF_INLINE void store_sums(const __m512i (&total)[ROWS][BLOCKS], int32_t* sums) {
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) {
      _mm512_storeu_si512(sums + row * kUnitOutputs + b * kBlockOutputs, total[row][b]);
    }
  }
}

// ROWS rows times a panel whose neighbours lie side by side: sums (rows x 64).
template <int ROWS, int BLOCKS>
FF_AVX512 static FF_INLINE void multiply_panel(
    const int8_t* x, int64_t stride, const uint8_t* panel, int64_t inputs, int32_t* sums) {
  __m512i total[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; b++) total[row][b] = _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < inputs; k += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      __m512i stored[BLOCKS];
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; b++) {
        stored[b] = _mm512_loadu_si512(panel + ((k / 4 + part) * BLOCKS + b) * kBlockBytes);
      }
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; row++) {
        const __m512i four = four_codes(x + row * stride + k + 4 * part);
#pragma GCC unroll 4
        for (int b = 0; b < BLOCKS; b++) add_products_of(total[row][b], stored[b], four);
      }
    }
  }
  store_sums(total, sums);
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
  store_sums(total, sums);
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
FF_AVX512 static void multiply_unit_by_panel(const UnitWork& work) {
  const int64_t inputs = work.group_blocks * (32 / BITS);
  int32_t sums[6 * kUnitOutputs];
  uint8_t* panel = panel_of(inputs / 4 * kUnitBlocks * kBlockBytes);
  for (int64_t group = 0; group < work.groups; group++) {
    const uint8_t* weight = work.weight + group * work.group_blocks * kUnitBlocks * kBlockBytes;
    unpack<BITS, kUnitBlocks, kUnitBlocks>(weight, work.group_blocks, kUnitBlocks * kBlockBytes, kBlockBytes, panel);
    const int8_t* x = work.codes + group * inputs;
    for (int64_t row = 0; row < work.rows;) {
      const int64_t rows = tile_rows(work.rows - row, work.planes), stride = work.stride;
      const int8_t* from = x + row * stride;
      switch (rows) {
        case 6: multiply_panel<6, kUnitBlocks>(from, stride, panel, inputs, sums); break;
        case 5: multiply_panel<5, kUnitBlocks>(from, stride, panel, inputs, sums); break;
        case 4: multiply_panel<4, kUnitBlocks>(from, stride, panel, inputs, sums); break;
        case 3: multiply_panel<3, kUnitBlocks>(from, stride, panel, inputs, sums); break;
        case 2: multiply_panel<2, kUnitBlocks>(from, stride, panel, inputs, sums); break;
        default: multiply_panel<1, kUnitBlocks>(from, stride, panel, inputs, sums);
      }
      finish(work, sums, kUnitOutputs, row, rows, 0, work.outputs, group);
      row += rows;
    }
  }
}

// Whether unpacking takes the pipes that multiply.
static inline bool shares_pipes() {
#if defined(FF_EMULATED)
  return true;
#else
  static const bool intel = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kGenuineIntel = 0x756e6547;  // "Genu"
    return __get_cpuid(0, &a, &b, &c, &d) && b == kGenuineIntel;
  }();
  return intel;
#endif
}

template <int BITS>
FF_AVX512 static void multiply(const UnitWork& work) {
  constexpr int64_t kFewestRowsOfPanel = 24;
  if (work.blocks != kUnitBlocks) multiply_unit<BITS, 1>(work);
  else if (work.rows >= kFewestRowsOfPanel && shares_pipes()) multiply_unit_by_panel<BITS>(work);
  else multiply_unit<BITS, kUnitBlocks>(work);
}

// Codes of 64 entries at once, by the scale's reciprocal: a division takes twice the time of all the rest. Where a
// product comes so near to the middle between two codes that its quotient might lie beyond it, all 64 are divided:
// product and quotient, of at most 128.5, differ by three roundings, some 2.3e-5. The reciprocal is never infinite or
// denormal, for a scale lies between FLT_MIN and FLT_MAX / 7.
struct ManyCodes {
  FF_AVX512 static int32_t write(const float* x, int64_t n, float scale, Bounds bounds, int8_t* codes) {
    constexpr int kAtOnce = 64;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale), doubtful = _mm512_set1_ps(0.49997f);
    const __m512 low = _mm512_set1_ps(bounds.low), high = _mm512_set1_ps(bounds.high);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + kAtOnce <= n; i += kAtOnce) {
      __m512i four[4];
      __m512 farthest = _mm512_setzero_ps();
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * v), inverse);
        const __m512 bounded = _mm512_min_ps(_mm512_max_ps(product, low), high);
        four[v] = _mm512_cvtps_epi32(bounded);
        farthest = _mm512_max_ps(farthest, _mm512_abs_ps(_mm512_sub_ps(bounded, _mm512_cvtepi32_ps(four[v]))));
      }
      const __m512i sixteen[2] = {_mm512_packs_epi32(four[0], four[1]), _mm512_packs_epi32(four[2], four[3])};
      _mm512_storeu_si512(
          codes + i, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(sixteen[0], sixteen[1])));
      if (_mm512_cmp_ps_mask(farthest, doubtful, _CMP_GT_OQ)) Codes::write(x + i, kAtOnce, scale, bounds, codes + i);
      add_products_of(sums, ones, _mm512_loadu_si512(codes + i));
    }
    int32_t parts[16];
    _mm512_storeu_si512(parts, sums);
    uint32_t sum = static_cast<uint32_t>(Codes::write(x + i, n - i, scale, bounds, codes + i));
    for (const int32_t part : parts) sum += static_cast<uint32_t>(part);
    return static_cast<int32_t>(sum);
  }
};

FF_DEFINE_QUANTIZE(FF_AVX512, ManyCodes)

FF_DEFINE_TABLE_PRODUCTS(FF_AVX512, SixteenFloats)

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

static const Path kPath{"avx512", 64, 96, quantize, {multiply<1>, multiply<2>}, spin, kTableProducts};

}  // namespace avx512
}  // namespace fiftyfold
