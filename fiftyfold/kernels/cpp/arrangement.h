// How weights lie in memory for the products: codes of 1 or 2 bits, in *blocks* of 16 outputs x 32 or 16 inputs.
//
// A block is 64 bytes. Its byte 4*o + i holds the codes of output o and of the inputs i, i + 4, i + 8, ...: that of
// input 4*g + i in the bits from bits*g on. A binary weight of -1, +1 is stored as 0, 1, a ternary one of -1, 0, +1 as
// 0, 1, 2. So one vector load, shifted and masked, gives the operands of a dot product of four inputs in each 32-bit
// lane, and every lane is an output of its own, in vectors of any width.
//
// Outputs come in *units* of 64, whose four blocks for the same inputs lie side by side; what is left over comes in
// units of 16. Each group of inputs (those that share scales) is padded to whole blocks; each unit is one stream.
//
// Where binary weights are looked up (`lookups.h`) the four blocks of a unit of 64 lie in *planes*: byte 64*i + o of the
// 256 is what is byte 4*o + i of blocks side by side. A vector then holds the same inputs of many outputs.
//
// The last block says what was arranged, so that no product takes it for something else.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fiftyfold {

constexpr int kBlockBytes = 64;
constexpr int kBlockOutputs = 16;
constexpr int kUnitBlocks = 4;
constexpr int kUnitOutputs = kBlockOutputs * kUnitBlocks;

struct Arrangement {
  int64_t outputs, inputs, groups;
  int bits;
  bool planes = false;

  int64_t block_inputs() const { return 32 / bits; }
  int64_t group_inputs() const { return inputs / groups; }
  int64_t group_blocks() const { return (group_inputs() + block_inputs() - 1) / block_inputs(); }
  int64_t blocks() const { return groups * group_blocks(); }
  int64_t padded_inputs() const { return blocks() * block_inputs(); }
  int64_t wide_units() const { return outputs / kUnitOutputs; }
  int64_t units() const {
    return wide_units() + (outputs % kUnitOutputs + kBlockOutputs - 1) / kBlockOutputs;
  }
  int64_t label_byte() const { return (outputs + kBlockOutputs - 1) / kBlockOutputs * blocks() * kBlockBytes; }
  int64_t bytes() const { return label_byte() + kBlockBytes; }

  bool is_wide(int64_t unit) const { return unit < wide_units(); }
  int64_t first_output(int64_t unit) const {
    return is_wide(unit) ? unit * kUnitOutputs
                         : wide_units() * kUnitOutputs + (unit - wide_units()) * kBlockOutputs;
  }
  int64_t first_byte(int64_t unit) const { return first_output(unit) / kBlockOutputs * blocks() * kBlockBytes; }
};

// What the last block holds.
struct Label {
  enum Kind : int32_t { kBlocks, kPlanes, kTables };  // the last is the entries of tables, see tables.cpp

  int64_t outputs, inputs, groups;
  int32_t bits, kind;
  uint8_t unused[kBlockBytes - 32];

  static Label of(const Arrangement& a) {
    return {a.outputs, a.inputs, a.groups, a.bits, a.planes ? kPlanes : kBlocks, {}};
  }

  // Of an arrangement of at least a block.
  static Label read(const uint8_t* arranged, int64_t bytes) {
    Label label;
    std::memcpy(&label, arranged + bytes - kBlockBytes, sizeof label);
    return label;
  }
};
static_assert(sizeof(Label) == kBlockBytes, "a label is a block");

// Four codes as they are stored, a byte each.
template <int BITS>
inline uint32_t stored_codes(const int8_t* codes) {
  uint32_t four;
  std::memcpy(&four, codes, sizeof four);
  if (BITS == 1) return ~four >> 7 & 0x01010101u;
  return ((four & 0x7f7f7f7fu) + 0x01010101u) ^ (four & 0x80808080u);  // plus 1, without a carry from -1
}

// Writes one group of an output's codes; its blocks are `step` bytes apart.
template <int BITS>
inline void arrange_group(const int8_t* codes, int64_t inputs, int64_t step, uint8_t* cells) {
  constexpr int kBlockInputs = 32 / BITS;
  const int64_t whole = inputs / kBlockInputs;
  for (int64_t block = 0; block < whole; block++, codes += kBlockInputs, cells += step) {
    uint32_t cell = 0;
    for (int part = 0; part < 8 / BITS; part++) cell |= stored_codes<BITS>(codes + 4 * part) << (BITS * part);
    std::memcpy(cells, &cell, sizeof cell);
  }
  for (int64_t k = 0; k < inputs - whole * kBlockInputs; k++) {
    const int code = BITS == 2 ? codes[k] + 1 : codes[k] > 0;
    cells[k % 4] |= static_cast<uint8_t>(code << BITS * (k / 4));
  }
}

// From four blocks side by side to planes, or back.
inline void to_planes(const uint8_t* __restrict blocks, uint8_t* __restrict planes) {
  for (int i = 0; i < 4; i++) {
    for (int o = 0; o < kUnitOutputs; o++) planes[kUnitOutputs * i + o] = blocks[4 * o + i];
  }
}

inline void from_planes(const uint8_t* __restrict planes, uint8_t* __restrict blocks) {
  for (int o = 0; o < kUnitOutputs; o++) {
    for (int i = 0; i < 4; i++) blocks[4 * o + i] = planes[kUnitOutputs * i + o];
  }
}

// Writes one unit of codes (outputs x inputs), its blocks side by side, to its place in `bytes`, which has room for
// `a.bytes()`.
inline void arrange_unit(const Arrangement& a, const int8_t* codes, int64_t unit, uint8_t* bytes) {
  const int64_t first = a.first_output(unit);
  const int64_t width = a.is_wide(unit) ? kUnitOutputs : kBlockOutputs, step = width * 4;
  uint8_t* base = bytes + a.first_byte(unit);
  std::memset(base, 0, static_cast<size_t>(a.blocks() * step));
  for (int64_t o = 0; o < width && first + o < a.outputs; o++) {
    const int8_t* row = codes + (first + o) * a.inputs;
    uint8_t* lane = base + o / kBlockOutputs * kBlockBytes + o % kBlockOutputs * 4;
    for (int64_t group = 0; group < a.groups; group++, row += a.group_inputs(), lane += a.group_blocks() * step) {
      a.bits == 1 ? arrange_group<1>(row, a.group_inputs(), step, lane)
                  : arrange_group<2>(row, a.group_inputs(), step, lane);
    }
  }
  if (!a.planes || !a.is_wide(unit)) return;
  for (int64_t block = 0; block < a.blocks(); block++, base += step) {
    uint8_t blocks[kUnitBlocks * kBlockBytes];
    std::memcpy(blocks, base, sizeof blocks);
    to_planes(blocks, base);
  }
}

}  // namespace fiftyfold
