// Sums looked up by AVX2 (`vpshufb`): 20 instructions for what `vpmaddubsw` and `vpaddw` do in 32.
#pragma once
#include "lookups.h"
#include "simd_x86.h"

namespace fiftyfold {
namespace lookups {
namespace avx2 {

#define FF_LOOKUPS FF_TARGET("avx2,f16c")

FF_DEFINE_FINISH(FF_LOOKUPS)

constexpr int64_t kAtOnce = 128;  // inputs whose tables are made together

inline int64_t table_bytes(int64_t inputs) { return (inputs + kAtOnce - 1) / kAtOnce * (kAtOnce / 4 * kTableBytes); }

// Within each half of the vectors: the first gets the first dwords of all four, the second the second ones.
FF_LOOKUPS static FF_INLINE void transpose_dwords(__m256i (&v)[4]) {
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
  const __m256i c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, c);
  v[1] = _mm256_unpackhi_epi64(a, c);
  v[2] = _mm256_unpacklo_epi64(b, d);
  v[3] = _mm256_unpackhi_epi64(b, d);
}

// Writes the 16 sums of each lane's four values and of `base` to the lane's place in the order of tables.
FF_LOOKUPS static FF_INLINE void write_tables(
    const __m256i (&values)[4], __m256i base, const int (&order)[32], uint8_t* to) {
  __m256i sums[16];
  sums[0] = base;
#pragma GCC unroll 15
  for (int i = 1; i < 16; i++) {
    sums[i] = _mm256_add_epi8(sums[i & (i - 1)], values[i & 1 ? 0 : i & 2 ? 1 : i & 4 ? 2 : 3]);
  }
  // Bytes of 16 vectors to 16 bytes of a vector, in each half.
  __m256i pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    pairs[i] = _mm256_unpacklo_epi8(sums[2 * i], sums[2 * i + 1]);
    pairs[8 + i] = _mm256_unpackhi_epi8(sums[2 * i], sums[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      quads[8 * half + i] = _mm256_unpacklo_epi16(pairs[8 * half + 2 * i], pairs[8 * half + 2 * i + 1]);
      quads[8 * half + 4 + i] = _mm256_unpackhi_epi16(pairs[8 * half + 2 * i], pairs[8 * half + 2 * i + 1]);
    }
  }
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; quarter++) {
    __m256i four[4] = {quads[4 * quarter], quads[4 * quarter + 1], quads[4 * quarter + 2], quads[4 * quarter + 3]};
    transpose_dwords(four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const int lane = 4 * quarter + i;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + order[lane] * kTableBytes), _mm256_castsi256_si128(four[i]));
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(to + order[16 + lane] * kTableBytes), _mm256_extracti128_si256(four[i], 1));
    }
  }
}

// The tables of 128 codes.
FF_LOOKUPS static FF_INLINE void tabulate_some(const int8_t* codes, uint8_t* tables) {
  // Lane -> table: the transposition leaves halves 0, 2, 4, 6 in the first half of a vector, 1, 3, 5, 7 in the other.
  static constexpr int kOrder[32] = {0, 1, 2, 3, 8,  9,  10, 11, 16, 17, 18, 19, 24, 25, 26, 27,
                                     4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  __m256i all[4], low[4], high[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) all[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
  transpose_dwords(all);
  const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    low[i] = _mm256_and_si256(all[i], nibble);
    // -8 ... 7, from the unsigned 8 ... 15, 0 ... 7.
    const __m256i raised = _mm256_and_si256(_mm256_srli_epi16(all[i], 4), nibble);
    high[i] = _mm256_sub_epi8(_mm256_xor_si256(raised, eight), eight);
  }
  write_tables(low, _mm256_setzero_si256(), kOrder, tables);
  write_tables(high, _mm256_set1_epi8(kRaised), kOrder, tables + 16);
}

FF_LOOKUPS inline void tabulate(const int8_t* codes, int64_t inputs, uint8_t* tables) {
  for (; inputs >= kAtOnce; inputs -= kAtOnce, codes += kAtOnce, tables += kAtOnce / 4 * kTableBytes) {
    tabulate_some(codes, tables);
  }
  if (inputs > 0) {
    int8_t rest[kAtOnce] = {};
    std::memcpy(rest, codes, static_cast<size_t>(inputs));
    tabulate_some(rest, tables);
  }
}

// The indices that the halves of bytes are.
FF_LOOKUPS static FF_INLINE __m256i first_indices(__m256i packed) {
  return _mm256_and_si256(packed, _mm256_set1_epi8(15));
}

FF_LOOKUPS static FF_INLINE __m256i second_indices(__m256i packed) {
  return _mm256_and_si256(_mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
}

// Four codes of a byte's half to a byte, for 64 outputs.
FF_LOOKUPS static FF_INLINE void unpack(const uint8_t* weight, int64_t blocks, uint8_t* panel) {
  constexpr int kVectors = kIndices * kUnitOutputs / 32;
  for (int64_t block = 0; block < blocks; block++) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++, weight += 32, panel += 32) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel), first_indices(packed));
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel) + kVectors, second_indices(packed));
    }
    panel += 32 * kVectors;
  }
}

// The outputs of a vector's second half come 16 after those of its first.
FF_LOOKUPS static FF_INLINE void add_widened(int32_t* total, __m256i sums) {
  __m256i* first = reinterpret_cast<__m256i*>(total);
  __m256i* second = reinterpret_cast<__m256i*>(total + 16);
  const __m256i a = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums));
  const __m256i b = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums, 1));
  _mm256_storeu_si256(first, _mm256_add_epi32(_mm256_loadu_si256(first), a));
  _mm256_storeu_si256(second, _mm256_add_epi32(_mm256_loadu_si256(second), b));
}

// In assembly, because GCC otherwise moves the lookups away from the additions and runs out of registers.
FF_LOOKUPS static FF_INLINE void add_sums(__m256i& sums, __m256i table, __m256i index, bool first) {
#if defined(FF_EMULATED)
  const __m256i found = _mm256_shuffle_epi8(table, index);
  sums = first ? found : _mm256_add_epi8(sums, found);
#else
  __m256i found;
  if (first) {
    asm("vpshufb %[index], %[table], %[sums]" : [sums] "=x"(sums) : [table] "x"(table), [index] "x"(index));
  } else {
    asm("vpshufb %[index], %[table], %[found]\n\tvpaddb %[found], %[sums], %[sums]"
        : [sums] "+x"(sums), [found] "=&x"(found)
        : [table] "x"(table), [index] "x"(index));
  }
#endif
}

// Half a block of one row times 64 outputs, added to the sums: in bytes that are indices, or in the first or second
// halves of packed ones.
enum class Indices { unpacked, first_halves, second_halves };

template <Indices INDICES>
FF_LOOKUPS static FF_INLINE void add_half(const uint8_t* tables, const uint8_t* bytes, __m256i (&sums)[2][2]) {
  const __m256i places = _mm256_set1_epi16(0x1001);  // 1 and 16
  __m256i low[2], high[2];
#pragma GCC unroll 4
  for (int i = 0; i < kIndices; i++) {
    const __m128i* table = reinterpret_cast<const __m128i*>(tables + i * kTableBytes);
    const __m256i lows = _mm256_broadcastsi128_si256(_mm_load_si128(table));
    const __m256i highs = _mm256_broadcastsi128_si256(_mm_load_si128(table + 1));
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i * kUnitOutputs + 32 * v));
      if (INDICES == Indices::first_halves) index = first_indices(index);
      if (INDICES == Indices::second_halves) index = second_indices(index);
      add_sums(low[v], lows, index, i == 0);
      add_sums(high[v], highs, index, i == 0);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; v++) {
    const __m256i a = _mm256_unpacklo_epi8(low[v], high[v]), b = _mm256_unpackhi_epi8(low[v], high[v]);
    sums[v][0] = _mm256_add_epi16(sums[v][0], _mm256_maddubs_epi16(a, places));
    sums[v][1] = _mm256_add_epi16(sums[v][1], _mm256_maddubs_epi16(b, places));
  }
}

// One row times 64 outputs, at most kPieceHalves halves, packed or unpacked, added to the totals.
template <bool PACKED>
FF_LOOKUPS static FF_INLINE void add_row(const uint8_t* tables, const uint8_t* bytes, int64_t blocks, int32_t* totals) {
  constexpr int64_t kHalfTables = kIndices * kTableBytes, kHalfBytes = kIndices * kUnitOutputs;
  __m256i sums[2][2];
  sums[0][0] = sums[0][1] = sums[1][0] = sums[1][1] = _mm256_set1_epi16(first_sum(2 * blocks));
  for (int64_t block = 0; block < blocks; block++, tables += 2 * kHalfTables, bytes += (PACKED ? 1 : 2) * kHalfBytes) {
    if (PACKED) {
      add_half<Indices::first_halves>(tables, bytes, sums);
      add_half<Indices::second_halves>(tables + kHalfTables, bytes, sums);
    } else {
      add_half<Indices::unpacked>(tables, bytes, sums);
      add_half<Indices::unpacked>(tables + kHalfTables, bytes + kHalfBytes, sums);
    }
  }
  add_widened(totals, sums[0][0]);
  add_widened(totals + 8, sums[0][1]);
  add_widened(totals + 32, sums[1][0]);
  add_widened(totals + 40, sums[1][1]);
}

FF_DEFINE_LOOKUPS(FF_LOOKUPS)

#undef FF_LOOKUPS

}  // namespace avx2
}  // namespace lookups
}  // namespace fiftyfold
