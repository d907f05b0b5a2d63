// Products in plain C++.
#pragma once
#include "products.h"

namespace fiftyfold {
namespace portable {

FF_DEFINE_FINISH()

// One block of 16 outputs and one group of inputs for one row.
template <int BITS>
static void multiply_row(const int8_t* x, const uint8_t* weight, int64_t step, int64_t blocks, int32_t* sums) {
  constexpr int kParts = 8 / BITS, kMask = (1 << BITS) - 1;
  for (int o = 0; o < kBlockOutputs; o++) sums[o] = 0;
  for (int64_t block = 0; block < blocks; block++, weight += step, x += 4 * kParts) {
    for (int part = 0; part < kParts; part++) {
      for (int o = 0; o < kBlockOutputs; o++) {
        int32_t sum = 0;
        for (int i = 0; i < 4; i++) sum += ((weight[4 * o + i] >> (BITS * part)) & kMask) * x[4 * part + i];
        sums[o] += sum;
      }
    }
  }
}

template <int BITS>
static void multiply(const UnitWork& work) {
  const int64_t step = work.blocks * kBlockBytes;
  for (int64_t group = 0; group < work.groups; group++) {
    const uint8_t* weight = work.weight + group * work.group_blocks * step;
    const int8_t* x = work.codes + group * work.group_blocks * (32 / BITS);
    for (int64_t row = 0; row < work.rows; row += work.planes) {
      for (int64_t o = 0; o < work.outputs; o += kBlockOutputs) {
        int32_t sums[2 * kBlockOutputs];
        for (int plane = 0; plane < work.planes; plane++) {
          multiply_row<BITS>(x + (row + plane) * work.stride, weight + o * 4, step, work.group_blocks,
                             sums + plane * kBlockOutputs);
        }
        finish(work, sums, kBlockOutputs, row, work.planes, o, least(kBlockOutputs, work.outputs - o), group);
      }
    }
  }
}

FF_DEFINE_QUANTIZE(, Codes)

FF_DEFINE_TABLE_PRODUCTS(, EightFloats)

static const Path kPath{"portable", 16, 96, quantize, {multiply<1>, multiply<2>}, nullptr, kTableProducts};

}  // namespace portable
}  // namespace fiftyfold
