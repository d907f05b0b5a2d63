// Products with AMX: 16 tokens times 16 outputs times 64 inputs in one instruction, eight times what `vpdpbusd` does.
//
// The instruction takes bytes from memory, so weights are unpacked first, into a panel in the caches: operands of 64
// bytes as `vpdpbusd` takes them, one for each row of a tile. It takes more tokens than one or two to pay for that.
#pragma once
#include "path_avx512.h"
#include "tiles_x86.h"

namespace fiftyfold {
namespace amx {

#define FF_AMX FF_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,prefer-vector-width=512")

// Rows below which AVX512 is quicker.
constexpr int64_t kFewestRows = 12;
constexpr int64_t kTokensAtOnce = 256;
constexpr int kBlocksAtOnce = 2;  // whose panel fits into the first cache
constexpr int64_t kStepInputs = 64;
constexpr int64_t kRowsAtOnce = 2 * tiles::kRows;
constexpr int64_t kSumsStride = kBlocksAtOnce * kBlockOutputs;

FF_DEFINE_FINISH(FF_AMX)

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

// Up to 16 rows, or 32 if PAIRED, times 16 outputs, or 32 if COUNT is 2: sums (rows x 32) in tiles 0 to 3, codes in 4
// and 5, weights in 6 and 7. `meanwhile` is called after each step.
template <int COUNT, bool PAIRED, typename Meanwhile>
static FF_INLINE void multiply_tiles(
    const Rows& rows, const uint8_t* panel, int64_t steps, int32_t* sums, Meanwhile meanwhile) {
  constexpr int64_t kStride = kSumsStride * 4;
  tiles::clear<0>(), tiles::clear<1>(), tiles::clear<2>(), tiles::clear<3>();
  for (int64_t step = 0; step < steps; step++) {
    const uint8_t* weights = panel + step * tiles::kBytes;
    tiles::load<6>(weights, tiles::kRowBytes);
    rows.load<4>(step, 0);
    tiles::add_products<0, 4, 6>();
    if (COUNT == 2) {
      tiles::load<7>(weights + steps * tiles::kBytes, tiles::kRowBytes);
      tiles::add_products<1, 4, 7>();
    }
    if (PAIRED) {
      rows.load<5>(step, tiles::kRows);
      tiles::add_products<2, 5, 6>();
      if (COUNT == 2) tiles::add_products<3, 5, 7>();
    }
    meanwhile();
  }
  int32_t* below = sums + tiles::kRows * kSumsStride;
  tiles::store<0>(sums, kStride);
  if (COUNT == 2) tiles::store<1>(sums + kBlockOutputs, kStride);
  if (PAIRED) tiles::store<2>(below, kStride);
  if (PAIRED && COUNT == 2) tiles::store<3>(below + kBlockOutputs, kStride);
}

// Tiles for some rows of codes, 32 at most: 16 above, and what is left beneath them. A tile without rows is an error,
// so those that are not needed get some too.
static inline void configure(int64_t rows_of_codes) {
  const int64_t above = least(rows_of_codes, tiles::kRows);
  const int64_t below = rows_of_codes > above ? rows_of_codes - above : above;
  tiles::Shapes shapes;
  const int64_t rows[tiles::kCount] = {above, above, below, below, above, below, tiles::kRows, tiles::kRows};
  for (int tile = 0; tile < tiles::kCount; tile++) {
    shapes.row_bytes[tile] = tiles::kRowBytes;
    shapes.rows[tile] = static_cast<uint8_t>(rows[tile]);
  }
  tiles::configure(shapes);
}

// Asks for the memory of the outputs, which fills from far away, while tiles are multiplied.
static inline void fetch_outputs(const UnitWork& work, int64_t row, int64_t rows, int64_t output, int64_t outputs) {
  constexpr int64_t kLineFloats = 16;
  for (int64_t token = row / work.planes; token < (row + rows) / work.planes; token++) {
    const float* y = work.y + token * work.y_stride + output;
    for (int64_t o = 0; o < outputs; o += kLineFloats) __builtin_prefetch(y + o, 1);
  }
}

// Sums that are computed and not yet outputs: they become outputs bit by bit while tiles are multiplied, by other
// pipes.
struct Unfinished {
  const UnitWork& work;
  int64_t output, outputs, group;
  const int32_t* sums = nullptr;
  int64_t row = 0, end = 0;

  void finish_some(int64_t rows) {
    rows = least(rows, end - row);
    if (rows <= 0) return;
    finish(work, sums, kSumsStride, row, rows, output, outputs, group);
    row += rows;
    sums += rows * kSumsStride;
  }
};

// One group of inputs, of COUNT of a unit's blocks from `first` on; rows 32 at once.
template <int BITS, int BLOCKS, int COUNT>
FF_AMX static void multiply_group(const UnitWork& work, int64_t group, int first, uint8_t* panel) {
  alignas(64) int32_t sums[2][kRowsAtOnce * kSumsStride];
  const int64_t inputs = work.group_blocks * (32 / BITS), steps = (inputs + kStepInputs - 1) / kStepInputs;
  const int64_t column = steps * tiles::kBytes, used = work.group_blocks * (8 / BITS) * tiles::kRowBytes;
  const uint8_t* weight = work.weight + (group * work.group_blocks * BLOCKS + first) * kBlockBytes;
  avx512::unpack<BITS, BLOCKS, COUNT>(weight, work.group_blocks, tiles::kRowBytes, column, panel);
  for (int b = 0; b < COUNT; b++) std::memset(panel + b * column + used, 0, static_cast<size_t>(column - used));
  const int64_t output = first * kBlockOutputs, outputs = least(COUNT * kBlockOutputs, work.outputs - output);
  Unfinished unfinished{work, output, outputs, group};
  const int64_t tokens_a_step = (kRowsAtOnce / work.planes + steps - 1) / steps;
  auto meanwhile = [&] { unfinished.finish_some(tokens_a_step * work.planes); };
  int64_t configured = 0;
  for (int64_t row = 0; row < work.rows; row += kRowsAtOnce) {
    const int64_t count = least(work.rows - row, kRowsAtOnce);
    if (count != configured) configure(count);
    configured = count;
    const Rows rows(work.codes + group * inputs + row * work.stride, work.stride, count, inputs);
    fetch_outputs(work, row, count, output, outputs);
    int32_t* to = sums[row / kRowsAtOnce % 2];
    count > tiles::kRows ? multiply_tiles<COUNT, true>(rows, panel, steps, to, meanwhile)
                         : multiply_tiles<COUNT, false>(rows, panel, steps, to, meanwhile);
    unfinished.sums = to, unfinished.row = row, unfinished.end = row + count;
  }
  unfinished.finish_some(kRowsAtOnce);
}

template <int BITS>
static void multiply(const UnitWork& work) {
  if (work.rows < kFewestRows) return avx512::multiply<BITS>(work);
  const int64_t steps = (work.group_blocks * (32 / BITS) + kStepInputs - 1) / kStepInputs;
  uint8_t* panel = avx512::panel_of(kBlocksAtOnce * steps * tiles::kBytes);
  for (int64_t group = 0; group < work.groups; group++) {
    if (work.blocks == 1) multiply_group<BITS, 1, 1>(work, group, 0, panel);
    for (int first = 0; work.blocks == kUnitBlocks && first < kUnitBlocks; first += kBlocksAtOnce) {
      multiply_group<BITS, kUnitBlocks, kBlocksAtOnce>(work, group, first, panel);
    }
  }
  tiles::release();
}

static int64_t spin(int64_t rounds) {
  configure(kRowsAtOnce);
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

static const Path kPath{
    "amx", 64, kTokensAtOnce, avx512::quantize, {multiply<1>, multiply<2>}, spin, avx512::kTableProducts};

}  // namespace amx
}  // namespace fiftyfold
