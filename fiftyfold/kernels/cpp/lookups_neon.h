// Sums looked up by NEON (`tbl`), where there is no dot product: 72 instructions for what multiplying does in 384.
#pragma once
#include <arm_neon.h>

#include "lookups.h"

namespace fiftyfold {
namespace lookups {
namespace neon {

FF_DEFINE_FINISH()

inline int64_t table_bytes(int64_t inputs) { return inputs / 4 * kTableBytes; }

// The 16 sums of four values, added to `base`.
static FF_INLINE uint8x16_t sums_of(uint8x16_t values, int index, uint8_t base) {
  uint8x16_t sums = vdupq_n_u8(base);
  const uint8x16_t numbers{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int bit = 0; bit < 4; bit++) {
    const uint8x16_t chosen = vtstq_u8(numbers, vdupq_n_u8(static_cast<uint8_t>(1 << bit)));
    const uint8x16_t value = vqtbl1q_u8(values, vdupq_n_u8(static_cast<uint8_t>(4 * bit + index)));
    sums = vaddq_u8(sums, vandq_u8(chosen, value));
  }
  return sums;
}

inline void tabulate(const int8_t* codes, int64_t inputs, uint8_t* tables) {
  for (; inputs > 0; inputs -= 16, codes += 16) {
    const int8x16_t all = vld1q_s8(codes);
    const uint8x16_t low = vandq_u8(vreinterpretq_u8_s8(all), vdupq_n_u8(15));
    const uint8x16_t high = vreinterpretq_u8_s8(vshrq_n_s8(all, 4));
    for (int i = 0; i < kIndices; i++, tables += kTableBytes) {
      vst1q_u8(tables, sums_of(low, i, 0));
      vst1q_u8(tables + 16, sums_of(high, i, kRaised));
    }
  }
}

// The indices that the halves of bytes are.
static FF_INLINE uint8x16_t first_indices(uint8x16_t packed) { return vandq_u8(packed, vdupq_n_u8(15)); }

static FF_INLINE uint8x16_t second_indices(uint8x16_t packed) { return vshrq_n_u8(packed, 4); }

// Four codes of a byte's half to a byte, for 64 outputs.
static FF_INLINE void unpack(const uint8_t* weight, int64_t blocks, uint8_t* panel) {
  constexpr int kBytes = kIndices * kUnitOutputs;
  for (int64_t block = 0; block < blocks; block++, panel += kBytes) {
    for (int i = 0; i < kBytes; i += 16, weight += 16, panel += 16) {
      const uint8x16_t packed = vld1q_u8(weight);
      vst1q_u8(panel, first_indices(packed));
      vst1q_u8(panel + kBytes, second_indices(packed));
    }
  }
}

static FF_INLINE void add_widened(int32_t* total, uint16x8_t sums) {
  const int16x8_t exact = vreinterpretq_s16_u16(sums);
  vst1q_s32(total, vaddw_s16(vld1q_s32(total), vget_low_s16(exact)));
  vst1q_s32(total + 4, vaddw_s16(vld1q_s32(total + 4), vget_high_s16(exact)));
}

// Half a block of one row times 64 outputs, added to the sums: in bytes that are indices, or in the first or second
// halves of packed ones.
enum class Indices { unpacked, first_halves, second_halves };

template <Indices INDICES>
static FF_INLINE void add_half(const uint8_t* tables, const uint8_t* bytes, uint16x8_t (&sums)[4][2]) {
  const uint8x8_t sixteen = vdup_n_u8(16);
  uint8x16_t low[4], high[4];
  for (int i = 0; i < kIndices; i++, tables += kTableBytes) {
    const uint8x16_t lows = vld1q_u8(tables), highs = vld1q_u8(tables + 16);
    for (int v = 0; v < 4; v++) {
      uint8x16_t index = vld1q_u8(bytes + i * kUnitOutputs + 16 * v);
      if (INDICES == Indices::first_halves) index = first_indices(index);
      if (INDICES == Indices::second_halves) index = second_indices(index);
      low[v] = i ? vaddq_u8(low[v], vqtbl1q_u8(lows, index)) : vqtbl1q_u8(lows, index);
      high[v] = i ? vaddq_u8(high[v], vqtbl1q_u8(highs, index)) : vqtbl1q_u8(highs, index);
    }
  }
  for (int v = 0; v < 4; v++) {
    sums[v][0] = vmlal_u8(vaddw_u8(sums[v][0], vget_low_u8(low[v])), vget_low_u8(high[v]), sixteen);
    sums[v][1] = vmlal_u8(vaddw_u8(sums[v][1], vget_high_u8(low[v])), vget_high_u8(high[v]), sixteen);
  }
}

// One row times 64 outputs, at most kPieceHalves halves, packed or unpacked, added to the totals.
template <bool PACKED>
static FF_INLINE void add_row(const uint8_t* tables, const uint8_t* bytes, int64_t blocks, int32_t* totals) {
  constexpr int64_t kHalfTables = kIndices * kTableBytes, kHalfBytes = kIndices * kUnitOutputs;
  uint16x8_t sums[4][2];
  for (int v = 0; v < 4; v++) sums[v][0] = sums[v][1] = vdupq_n_u16(static_cast<uint16_t>(first_sum(2 * blocks)));
  for (int64_t block = 0; block < blocks; block++, tables += 2 * kHalfTables, bytes += (PACKED ? 1 : 2) * kHalfBytes) {
    if (PACKED) {
      add_half<Indices::first_halves>(tables, bytes, sums);
      add_half<Indices::second_halves>(tables + kHalfTables, bytes, sums);
    } else {
      add_half<Indices::unpacked>(tables, bytes, sums);
      add_half<Indices::unpacked>(tables + kHalfTables, bytes + kHalfBytes, sums);
    }
  }
  for (int v = 0; v < 4; v++) {
    add_widened(totals + 16 * v, sums[v][0]);
    add_widened(totals + 16 * v + 8, sums[v][1]);
  }
}

FF_DEFINE_LOOKUPS()

}  // namespace neon
}  // namespace lookups
}  // namespace fiftyfold
