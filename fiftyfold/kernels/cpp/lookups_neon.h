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

// Four codes of a byte's half to a byte, for 64 outputs.
static FF_INLINE void unpack(const uint8_t* weight, int64_t step, int64_t blocks, uint8_t* panel) {
  for (int64_t block = 0; block < blocks; block++, weight += step, panel += 2 * kIndices * kUnitOutputs) {
    for (int part = 0; part < kUnitBlocks; part++) {
      const uint8x16x4_t bytes = vld4q_u8(weight + part * kBlockBytes);
      for (int i = 0; i < kIndices; i++) {
        uint8_t* to = panel + i * kUnitOutputs + part * kBlockOutputs;
        vst1q_u8(to, vandq_u8(bytes.val[i], vdupq_n_u8(15)));
        vst1q_u8(to + kIndices * kUnitOutputs, vshrq_n_u8(bytes.val[i], 4));
      }
    }
  }
}

static FF_INLINE void add_widened(int32_t* total, uint16x8_t sums) {
  const int16x8_t exact = vreinterpretq_s16_u16(sums);
  vst1q_s32(total, vaddw_s16(vld1q_s32(total), vget_low_s16(exact)));
  vst1q_s32(total + 4, vaddw_s16(vld1q_s32(total + 4), vget_high_s16(exact)));
}

// One row times 64 outputs, at most kPieceHalves halves, added to the totals.
static FF_INLINE void add_row(const uint8_t* tables, const uint8_t* panel, int64_t halves, int32_t* totals) {
  const uint8x8_t sixteen = vdup_n_u8(16);
  uint16x8_t sums[4][2];
  for (int v = 0; v < 4; v++) sums[v][0] = sums[v][1] = vdupq_n_u16(static_cast<uint16_t>(first_sum(halves)));
  for (int64_t half = 0; half < halves; half++, panel += kIndices * kUnitOutputs) {
    uint8x16_t low[4], high[4];
    for (int i = 0; i < kIndices; i++, tables += kTableBytes) {
      const uint8x16_t lows = vld1q_u8(tables), highs = vld1q_u8(tables + 16);
      for (int v = 0; v < 4; v++) {
        const uint8x16_t index = vld1q_u8(panel + i * kUnitOutputs + 16 * v);
        low[v] = i ? vaddq_u8(low[v], vqtbl1q_u8(lows, index)) : vqtbl1q_u8(lows, index);
        high[v] = i ? vaddq_u8(high[v], vqtbl1q_u8(highs, index)) : vqtbl1q_u8(highs, index);
      }
    }
    for (int v = 0; v < 4; v++) {
      sums[v][0] = vmlal_u8(vaddw_u8(sums[v][0], vget_low_u8(low[v])), vget_low_u8(high[v]), sixteen);
      sums[v][1] = vmlal_u8(vaddw_u8(sums[v][1], vget_high_u8(low[v])), vget_high_u8(high[v]), sixteen);
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
