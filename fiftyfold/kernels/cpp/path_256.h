// Products in 256 bits, included once with AVX2 alone and once with AVX-VNNI besides: FF_PATH names the namespace, and
// FF_VNNI tells which.
//
// AVX2 multiplies bytes by bytes and adds them in pairs to 16 bits (`vpmaddubsw`). A pair of ternary codes (0 ... 2)
// times input codes (-128 ... 127) lies between -512 and 508, so 64 of them add up in 16 bits without overflow
// (-32768 ... 32512), whatever the data; then they are widened to 32 bits. Binary codes (0, 1) leave room for twice as
// many. AVX-VNNI adds four products to 32 bits at once (`vpdpbusd`).
#include "lookups_x86.h"
#include "products.h"
#include "simd_x86.h"

namespace fiftyfold {
namespace FF_PATH {

#define FF_AVX2 FF_TARGET("avx2,f16c")

FF_DEFINE_FINISH(FF_AVX2)

constexpr int kSteps = 64;  // of four inputs, between two widenings

// A row's four codes at `x`, in all lanes.
FF_AVX2 static FF_INLINE __m256i four_codes(const int8_t* x) {
  int32_t codes;
  std::memcpy(&codes, x, sizeof codes);
  return _mm256_set1_epi32(codes);
}

#if FF_VNNI
// In assembly, because GCC 12 otherwise moves accumulators from register to register.
FF_AVX2 static FF_INLINE void add_products_of(__m256i& sums, __m256i stored, __m256i codes) {
#if defined(FF_EMULATED)
  sums = _mm256_dpbusd_epi32(sums, stored, codes);
#else
  asm("%{vex%} vpdpbusd %[codes], %[stored], %[sums]" : [sums] "+x"(sums) : [stored] "x"(stored), [codes] "x"(codes));
#endif
}

FF_AVX2 static FF_INLINE __m256i widened(__m256i sums) { return sums; }
#else
// In assembly, because GCC otherwise moves the products away from the additions, runs out of registers, and takes
// twice as long.
FF_AVX2 static FF_INLINE void add_products_of(__m256i& sums, __m256i stored, __m256i codes) {
#if defined(FF_EMULATED)
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(stored, codes));
#else
  __m256i products;
  asm("vpmaddubsw %[codes], %[stored], %[products]\n\tvpaddw %[products], %[sums], %[sums]"
      : [sums] "+x"(sums), [products] "=&x"(products)
      : [stored] "x"(stored), [codes] "x"(codes));
#endif
}

FF_AVX2 static FF_INLINE __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

FF_AVX2 static FF_INLINE void add_widened(int32_t* total, __m256i sums) {
  __m256i* at = reinterpret_cast<__m256i*>(total);
  _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), widened(sums)));
}

// Unpacks `blocks` blocks of one column of blocks into bytes: 64 for each four inputs.
template <int BITS>
FF_AVX2 static FF_INLINE void unpack(const uint8_t* weight, int64_t step, int64_t blocks, uint8_t* panel) {
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
  for (int64_t block = 0; block < blocks; block++, weight += step) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
    __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + 32));
    for (int part = 0; part < 8 / BITS; part++, panel += kBlockBytes) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), _mm256_and_si256(a, mask));
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel + 32), _mm256_and_si256(b, mask));
      a = _mm256_srli_epi16(a, BITS);
      b = _mm256_srli_epi16(b, BITS);
    }
  }
}

// ROWS rows times 16 outputs, at most kSteps steps, added to the totals (rows x 16).
template <int ROWS>
FF_AVX2 static FF_INLINE void add_products(
    const int8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* totals) {
  __m256i sums[ROWS][2];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = _mm256_setzero_si256();
  for (int64_t step = 0; step < steps; step++) {
    const __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + step * kBlockBytes));
    const __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + step * kBlockBytes + 32));
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      const __m256i codes = four_codes(x + row * stride + 4 * step);
      add_products_of(sums[row][0], a, codes);
      add_products_of(sums[row][1], b, codes);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
    add_widened(totals + row * kBlockOutputs, sums[row][0]);
    add_widened(totals + row * kBlockOutputs + 8, sums[row][1]);
  }
}

FF_AVX2 static FF_INLINE void add_products(
    int64_t rows, const int8_t* x, int64_t stride, const uint8_t* panel, int64_t steps, int32_t* totals) {
  for (; rows >= 6; rows -= 6, x += 6 * stride, totals += 6 * kBlockOutputs) {
    add_products<6>(x, stride, panel, steps, totals);
  }
  switch (rows) {
    case 5: return add_products<5>(x, stride, panel, steps, totals);
    case 4: return add_products<4>(x, stride, panel, steps, totals);
    case 3: return add_products<3>(x, stride, panel, steps, totals);
    case 2: return add_products<2>(x, stride, panel, steps, totals);
    case 1: return add_products<1>(x, stride, panel, steps, totals);
  }
}

constexpr int64_t kTokens = 48;

// Many rows: unpacks a piece of the weights into the first cache, and uses it for all of them.
template <int BITS>
FF_AVX2 static void multiply_rows(const UnitWork& work) {
  constexpr int64_t kParts = 8 / BITS, kPiece = kSteps / kParts;
  alignas(32) uint8_t panel[kSteps * kBlockBytes];
  alignas(32) int32_t totals[2 * kTokens * kBlockOutputs];
  const int64_t step = work.blocks * kBlockBytes;
  for (int64_t group = 0; group < work.groups; group++) {
    for (int64_t o = 0; o < work.outputs; o += kBlockOutputs) {
      const uint8_t* weight = work.weight + group * work.group_blocks * step + o * 4;
      const int8_t* x = work.codes + group * work.group_blocks * 4 * kParts;
      std::memset(totals, 0, static_cast<size_t>(work.rows * kBlockOutputs) * sizeof *totals);
      for (int64_t block = 0; block < work.group_blocks; block += kPiece) {
        const int64_t blocks = least(kPiece, work.group_blocks - block);
        unpack<BITS>(weight + block * step, step, blocks, panel);
        add_products(work.rows, x + block * 4 * kParts, work.stride, panel, blocks * kParts, totals);
      }
      finish(work, totals, kBlockOutputs, 0, work.rows, o, least(kBlockOutputs, work.outputs - o), group);
    }
  }
}

// One row times BLOCKS blocks side by side. Codes in the odd places are left where they are in their byte, and so
// count 2**BITS times: one shift less. Sums of those are widened before they overflow.
template <int BITS, int VECTORS>
FF_AVX2 static FF_INLINE void add_row(
    const int8_t* x, const uint8_t* weight, int64_t step, int64_t blocks, int32_t* totals) {
  constexpr int kPairs = 4 / BITS, kPiece = BITS == 1 ? 16 : 8;
  const __m256i even = _mm256_set1_epi8((1 << BITS) - 1), odd = _mm256_slli_epi16(even, BITS);
  __m256i even_total[VECTORS], odd_total[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) even_total[v] = odd_total[v] = _mm256_setzero_si256();
  for (int64_t done = 0; done < blocks; done += kPiece) {
    const int64_t end = least(blocks, done + kPiece);
    __m256i even_sum[VECTORS], odd_sum[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) even_sum[v] = odd_sum[v] = _mm256_setzero_si256();
    for (int64_t block = done; block < end; block++) {
      const uint8_t* from = weight + block * step;
      const int8_t* codes = x + block * 8 * kPairs;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        _mm_prefetch(reinterpret_cast<const char*>(from + 32 * v + 4096), _MM_HINT_T0);
        __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * v));
#pragma GCC unroll 4
        for (int pair = 0; pair < kPairs; pair++) {
          if (pair) packed = _mm256_srli_epi16(packed, 2 * BITS);
          add_products_of(even_sum[v], _mm256_and_si256(packed, even), four_codes(codes + 8 * pair));
          add_products_of(odd_sum[v], _mm256_and_si256(packed, odd), four_codes(codes + 8 * pair + 4));
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      even_total[v] = _mm256_add_epi32(even_total[v], widened(even_sum[v]));
      odd_total[v] = _mm256_add_epi32(odd_total[v], widened(odd_sum[v]));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; v++) {
    const __m256i total = _mm256_add_epi32(even_total[v], _mm256_srai_epi32(odd_total[v], BITS));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals + 8 * v), total);
  }
}

template <int BITS>
FF_AVX2 static void multiply_few(const UnitWork& work) {
  const int64_t step = work.blocks * kBlockBytes;
  int32_t totals[2 * kUnitOutputs];
  for (int64_t row = 0; row < work.rows; row += work.planes) {
    for (int64_t group = 0; group < work.groups; group++) {
      const uint8_t* weight = work.weight + group * work.group_blocks * step;
      for (int plane = 0; plane < work.planes; plane++) {
        const int8_t* x = work.codes + (row + plane) * work.stride + group * work.group_blocks * (32 / BITS);
        int32_t* to = totals + plane * kUnitOutputs;
        if (work.blocks == kUnitBlocks) {
          add_row<BITS, 4>(x, weight, step, work.group_blocks, to);
          add_row<BITS, 4>(x, weight + 2 * kBlockBytes, step, work.group_blocks, to + 2 * kBlockOutputs);
        } else {
          add_row<BITS, 2>(x, weight, step, work.group_blocks, to);
        }
      }
      finish(work, totals, kUnitOutputs, row, work.planes, 0, work.outputs, group);
    }
  }
}

constexpr int64_t kFewRows = 2;

template <int BITS>
FF_AVX2 static void multiply(const UnitWork& work) {
  work.rows <= kFewRows ? multiply_few<BITS>(work) : multiply_rows<BITS>(work);
}

#if !FF_VNNI
FF_AVX2 static void multiply_binary(const UnitWork& work) {
  if (!work.tables || work.blocks != kUnitBlocks) return multiply<1>(work);
  int32_t totals[2 * kTokens * kUnitOutputs];
  lookups::avx2::multiply(work, totals);
}
#endif

FF_DEFINE_QUANTIZE(FF_AVX2, Codes)

FF_DEFINE_TABLE_PRODUCTS(FF_AVX2, EightFloats)

FF_AVX2 static int64_t spin(int64_t rounds) {
  constexpr int kSums = 10;
  __m256i sums[kSums];
  const __m256i ones = _mm256_set1_epi8(1);
#pragma GCC unroll 10
  for (int i = 0; i < kSums; i++) sums[i] = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 10
    for (int i = 0; i < kSums; i++) add_products_of(sums[i], ones, ones);
  }
#pragma GCC unroll 10
  for (int i = 1; i < kSums; i++) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  int32_t sink[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sink), sums[0]);
  // One operation less for a sum that cannot be, so that the compiler must compute it.
  return rounds * kSums * 64 - (sink[0] == -12345);
}

#undef FF_AVX2

#if FF_VNNI
static const Path kPath{"avxvnni", 32, kTokens, quantize, {multiply<1>, multiply<2>}, spin, kTableProducts};
#else
static const Path kPath{
    "avx2", 32, kTokens, quantize, {multiply_binary, multiply<2>}, spin, kTableProducts, lookups::avx2::tabulate,
    lookups::avx2::table_bytes};
#endif

}  // namespace FF_PATH
}  // namespace fiftyfold
