// Products with AMX: 16 tokens times 16 outputs times 64 inputs in one instruction, eight times what `vpdpbusd` does.
//
// The instruction takes bytes from memory, so weights are unpacked first, into a panel in the caches: operands of 64 bytes
// as `vpdpbusd` takes them, one for each row of a tile. It takes more tokens than one or two to pay for that.
#pragma once
#include "path_avx512.h"
#include "tiles_x86.h"

namespace fiftyfold {
namespace amx {

#define FF_AMX FF_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")

// Rows below which AVX512 is quicker.
constexpr int64_t kFewestRows = 3;
constexpr int64_t kStepInputs = 64;
constexpr int64_t kRowsAtOnce = 2 * tiles::kRows;

FF_DEFINE_FINISH(FF_AMX)

static inline int64_t steps_of(int64_t group_inputs) { return (group_inputs + kStepInputs - 1) / kStepInputs; }

// Rows of codes as the tiles read them, 64 inputs a step. The last step may end earlier: its codes are copied beside
// zeros, for nothing may be read beyond the rows.
struct Rows {
  const int8_t* codes;
  int64_t stride, whole_steps;
  int8_t last[kRowsAtOnce][kStepInputs];

  Rows(const int8_t* from, int64_t row_stride, int64_t rows, int64_t inputs)
      : codes(from), stride(row_stride), whole_steps(inputs / kStepInputs) {
    const int64_t left = inputs % kStepInputs;
    if (!left) return;
    std::memset(last, 0, sizeof last);
    for (int64_t row = 0; row < rows; row++) {
      std::memcpy(last[row], codes + row * stride + whole_steps * kStepInputs, static_cast<size_t>(left));
    }
  }

  template <int TILE>
  void load(int64_t step, int64_t row) const {
    if (step < whole_steps) tiles::load<TILE>(codes + row * stride + step * kStepInputs, stride);
    else tiles::load<TILE>(last[row], kStepInputs);
  }
};

// Up to 32 rows times 32 outputs: sums in tiles 0 to 3, codes in 4 and 5, weights in 6 and 7.
static inline void multiply_pair(const Rows& rows, const uint8_t* panel, int64_t steps, int32_t* sums) {
  const int64_t column = steps * tiles::kBytes, stride = kUnitOutputs * 4;
  tiles::clear<0>(), tiles::clear<1>(), tiles::clear<2>(), tiles::clear<3>();
  for (int64_t step = 0; step < steps; step++) {
    const uint8_t* weights = panel + step * tiles::kBytes;
    tiles::load<6>(weights, tiles::kRowBytes);
    rows.load<4>(step, 0);
    tiles::add_products<0, 4, 6>();
    tiles::load<7>(weights + column, tiles::kRowBytes);
    tiles::add_products<1, 4, 7>();
    rows.load<5>(step, tiles::kRows);
    tiles::add_products<2, 5, 6>();
    tiles::add_products<3, 5, 7>();
  }
  int32_t* below = sums + tiles::kRows * kUnitOutputs;
  tiles::store<0>(sums, stride), tiles::store<1>(sums + kBlockOutputs, stride);
  tiles::store<2>(below, stride), tiles::store<3>(below + kBlockOutputs, stride);
}

// Up to 16 rows times 64 outputs: sums in tiles 0 to 3, codes in 4, weights in 5 to 7.
static inline void multiply_wide(const Rows& rows, const uint8_t* panel, int64_t steps, int32_t* sums) {
  const int64_t column = steps * tiles::kBytes, stride = kUnitOutputs * 4;
  tiles::clear<0>(), tiles::clear<1>(), tiles::clear<2>(), tiles::clear<3>();
  for (int64_t step = 0; step < steps; step++) {
    const uint8_t* weights = panel + step * tiles::kBytes;
    rows.load<4>(step, 0);
    tiles::load<5>(weights, tiles::kRowBytes);
    tiles::add_products<0, 4, 5>();
    tiles::load<6>(weights + column, tiles::kRowBytes);
    tiles::add_products<1, 4, 6>();
    tiles::load<7>(weights + 2 * column, tiles::kRowBytes);
    tiles::add_products<2, 4, 7>();
    tiles::load<5>(weights + 3 * column, tiles::kRowBytes);
    tiles::add_products<3, 4, 5>();
  }
  tiles::store<0>(sums, stride), tiles::store<1>(sums + kBlockOutputs, stride);
  tiles::store<2>(sums + 2 * kBlockOutputs, stride), tiles::store<3>(sums + 3 * kBlockOutputs, stride);
}

// Up to 16 rows times 16 outputs.
static inline void multiply_narrow(const Rows& rows, const uint8_t* panel, int64_t steps, int32_t* sums) {
  tiles::clear<0>();
  for (int64_t step = 0; step < steps; step++) {
    rows.load<4>(step, 0);
    tiles::load<6>(panel + step * tiles::kBytes, tiles::kRowBytes);
    tiles::add_products<0, 4, 6>();
  }
  tiles::store<0>(sums, kUnitOutputs * 4);
}

// Tiles for `above` rows and for `below` rows beneath them.
static inline void configure(int64_t above, int64_t below) {
  tiles::Shapes shapes;
  for (int tile = 0; tile < tiles::kCount; tile++) {
    const bool lower = below && (tile == 2 || tile == 3 || tile == 5);
    shapes.row_bytes[tile] = tiles::kRowBytes;
    shapes.rows[tile] = static_cast<uint8_t>(tile == 6 || tile == 7 || (!below && tile == 5) ? tiles::kRows
                                             : lower                                         ? below
                                                                                             : above);
  }
  tiles::configure(shapes);
}

// One group of one unit: rows in blocks of 32, or 16 where no more are there.
template <int BITS, int BLOCKS>
FF_AMX static void multiply_group(const UnitWork& work, int64_t group, uint8_t* panel) {
  alignas(64) int32_t sums[kRowsAtOnce * kUnitOutputs];
  const int64_t inputs = work.group_blocks * (32 / BITS), steps = steps_of(inputs);
  const uint8_t* weight = work.weight + group * work.group_blocks * BLOCKS * kBlockBytes;
  const int8_t* codes = work.codes + group * inputs;
  const int64_t column = steps * tiles::kBytes, used = work.group_blocks * (8 / BITS) * tiles::kRowBytes;
  avx512::unpack<BITS, BLOCKS>(weight, work.group_blocks, tiles::kRowBytes, column, panel);
  for (int b = 0; b < BLOCKS; b++) std::memset(panel + b * column + used, 0, static_cast<size_t>(column - used));
  int64_t configured = 0;
  for (int64_t row = 0; row < work.rows;) {
    const bool paired = BLOCKS == kUnitBlocks && work.rows - row > tiles::kRows;
    const int64_t count = least(work.rows - row, paired ? kRowsAtOnce : tiles::kRows);
    if (count != configured) configure(least(count, tiles::kRows), count > tiles::kRows ? count - tiles::kRows : 0);
    configured = count;
    const Rows rows(codes + row * work.stride, work.stride, count, inputs);
    if (paired) {
      multiply_pair(rows, panel, steps, sums);
      multiply_pair(rows, panel + 2 * column, steps, sums + 2 * kBlockOutputs);
    } else if (BLOCKS == kUnitBlocks) {
      multiply_wide(rows, panel, steps, sums);
    } else {
      multiply_narrow(rows, panel, steps, sums);
    }
    finish(work, sums, kUnitOutputs, row, count, 0, work.outputs, group);
    row += count;
  }
}

template <int BITS>
static void multiply(const UnitWork& work) {
  if (work.rows < kFewestRows) return avx512::multiply<BITS>(work);
  const int64_t steps = steps_of(work.group_blocks * (32 / BITS));
  uint8_t* panel = avx512::panel_of(work.blocks * steps * tiles::kBytes);
  for (int64_t group = 0; group < work.groups; group++) {
    work.blocks == kUnitBlocks ? multiply_group<BITS, kUnitBlocks>(work, group, panel)
                               : multiply_group<BITS, 1>(work, group, panel);
  }
  tiles::release();
}

static int64_t spin(int64_t rounds) {
  configure(tiles::kRows, tiles::kRows);
  for (int64_t round = 0; round < rounds; round++) {
    tiles::add_products<0, 4, 6>();
    tiles::add_products<1, 4, 7>();
    tiles::add_products<2, 5, 6>();
    tiles::add_products<3, 5, 7>();
  }
  tiles::release();
  return rounds * 4 * 2 * tiles::kRows * kBlockOutputs * kStepInputs;
}

#undef FF_AMX

static const Path kPath{"amx", 256, avx512::quantize, {multiply<1>, multiply<2>}, spin};

}  // namespace amx
}  // namespace fiftyfold
