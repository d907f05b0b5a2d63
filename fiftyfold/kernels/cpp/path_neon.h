// Products with NEON, included once without and once with the dot product of four bytes (`sdot`): FF_PATH names the
// namespace, and FF_DOT tells which.
#include <arm_neon.h>

#include "lookups_neon.h"
#include "products.h"

namespace fiftyfold {
namespace FF_PATH {

#if FF_DOT
#define FF_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#else
#define FF_NEON
#endif

FF_DEFINE_FINISH(FF_NEON)

// Adds the products of stored codes and the four input codes in lane LANE to one sum for each output.
template <int LANE>
FF_NEON static FF_INLINE int32x4_t add_products_of(int32x4_t sums, int8x16_t stored, int8x16_t codes) {
#if FF_DOT
  return vdotq_laneq_s32(sums, stored, codes, LANE);
#else
  const int8x8_t four = vreinterpret_s8_s32(vdup_n_s32(vgetq_lane_s32(vreinterpretq_s32_s8(codes), LANE)));
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(stored), four));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(stored), four));
  return vaddq_s32(sums, vpaddq_s32(low, high));
#endif
}

// The codes in the places from PLACE on, for 16 inputs in four lanes, times all rows.
template <int BITS, int ROWS, int LANE>
FF_NEON static FF_INLINE void add_lane(
    const uint8x16_t (&packed)[4], int place, const int8x16_t (&codes)[ROWS], int32x4_t (&total)[ROWS][4]) {
  const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
  const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-BITS * (place + LANE)));
  for (int v = 0; v < 4; v++) {
    const int8x16_t stored = vreinterpretq_s8_u8(vandq_u8(vshlq_u8(packed[v], shift), mask));
    for (int row = 0; row < ROWS; row++) {
      total[row][v] = add_products_of<LANE>(total[row][v], stored, codes[row]);
    }
  }
}

// ROWS rows times one block of 16 outputs, one group of inputs: sums (rows x 16).
template <int BITS, int ROWS>
FF_NEON static FF_INLINE void multiply_rows(
    const int8_t* x, int64_t stride, const uint8_t* weight, int64_t step, int64_t blocks, int32_t* sums) {
  int32x4_t total[ROWS][4];
  for (int row = 0; row < ROWS; row++) {
    for (int v = 0; v < 4; v++) total[row][v] = vdupq_n_s32(0);
  }
  for (int64_t block = 0; block < blocks; block++, weight += step) {
    uint8x16_t packed[4];
    for (int v = 0; v < 4; v++) packed[v] = vld1q_u8(weight + 16 * v);
    for (int place = 0; place < 8 / BITS; place += 4, x += 16) {
      int8x16_t codes[ROWS];
      for (int row = 0; row < ROWS; row++) codes[row] = vld1q_s8(x + row * stride);
      add_lane<BITS, ROWS, 0>(packed, place, codes, total);
      add_lane<BITS, ROWS, 1>(packed, place, codes, total);
      add_lane<BITS, ROWS, 2>(packed, place, codes, total);
      add_lane<BITS, ROWS, 3>(packed, place, codes, total);
    }
  }
  for (int row = 0; row < ROWS; row++) {
    for (int v = 0; v < 4; v++) vst1q_s32(sums + row * kBlockOutputs + 4 * v, total[row][v]);
  }
}

template <int BITS>
FF_NEON static void multiply(const UnitWork& work) {
  const int64_t step = work.blocks * kBlockBytes;
  int32_t sums[4 * kBlockOutputs];
  for (int64_t group = 0; group < work.groups; group++) {
    for (int64_t o = 0; o < work.outputs; o += kBlockOutputs) {
      const uint8_t* weight = work.weight + group * work.group_blocks * step + o * 4;
      for (int64_t row = 0; row < work.rows;) {
        const int8_t* x = work.codes + row * work.stride + group * work.group_blocks * (32 / BITS);
        const int64_t left = work.rows - row, rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (rows == 4) multiply_rows<BITS, 4>(x, work.stride, weight, step, work.group_blocks, sums);
        else if (rows == 2) multiply_rows<BITS, 2>(x, work.stride, weight, step, work.group_blocks, sums);
        else multiply_rows<BITS, 1>(x, work.stride, weight, step, work.group_blocks, sums);
        finish(work, sums, kBlockOutputs, row, rows, o, least(kBlockOutputs, work.outputs - o), group);
        row += rows;
      }
    }
  }
}

constexpr int64_t kTokens = 48;

#if !FF_DOT
static void multiply_binary(const UnitWork& work) {
  if (!work.tables || work.blocks != kUnitBlocks) return multiply<1>(work);
  int32_t totals[2 * kTokens * kUnitOutputs];
  lookups::neon::multiply(work, totals);
}
#endif

FF_DEFINE_QUANTIZE(FF_NEON, Codes)

FF_DEFINE_TABLE_PRODUCTS(FF_NEON, EightFloats)

#undef FF_NEON

#if FF_DOT
static const Path kPath{"neondot", 16, kTokens, quantize, {multiply<1>, multiply<2>}, nullptr, kTableProducts};
#else
static const Path kPath{
    "neon", 16, kTokens, quantize, {multiply_binary, multiply<2>}, nullptr, kTableProducts,
    lookups::neon::tabulate, lookups::neon::table_bytes};
#endif

}  // namespace FF_PATH
}  // namespace fiftyfold
