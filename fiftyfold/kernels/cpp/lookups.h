// Binary weights times rows of codes by looking sums up, for processors that take several instructions for a product of
// bytes and its addition.
//
// Four binary codes (0, 1) of an output are an index of four bits, and what they add up to with a row's four input
// codes is one of 16 sums. One instruction looks up a vector of them, and they fit into a byte if an input code is cut
// in two: code = 16 * high + low, with high in -8 ... 7 and low in 0 ... 15. Sums of four low halves lie in 0 ... 60,
// those of four high halves plus 32 as well, so that four lookups of each add up in bytes. Then both become 16 bits,
// 256 inputs of which are summed modulo 2**16: the true sum lies in -32768 ... 32512. The idea of such tables is
// T-MAC's (arXiv 2407.00088).
//
// A *half* is 16 inputs, four indices: index i has the inputs i, i + 4, i + 8 and i + 12, as they lie in a byte's half.
#pragma once
#include "products.h"

namespace fiftyfold {
namespace lookups {

constexpr int64_t kIndices = 4;       // of a half
constexpr int64_t kTableBytes = 32;   // 16 sums of low halves, then 16 of high ones
constexpr int kRaised = 32;           // what sums of high halves are raised by
constexpr int64_t kPieceHalves = 16;  // between two widenings
constexpr int64_t kPanelBytes = kPieceHalves * kIndices * kUnitOutputs;
constexpr int64_t kFewRows = 2;  // that read their weights as they lie, since unpacking them first takes longer

// What the sums of so many halves begin with, modulo 2**16: it takes off what their high halves are raised by.
constexpr int16_t first_sum(int64_t halves) { return static_cast<int16_t>(-16 * kRaised * kIndices * halves); }

}  // namespace lookups

// Rows whose tables the work has times 64 outputs, whose blocks lie in planes. Many rows share what is unpacked.
//
// Compiled once for each instruction set, which has `unpack`, `add_row` and `finish`.
#define FF_DEFINE_LOOKUPS(target)                                                                        \
  target inline void multiply(const UnitWork& work, int32_t* totals) {                                   \
    using namespace fiftyfold::lookups;                                                                  \
    alignas(32) uint8_t panel[kPanelBytes];                                                              \
    constexpr int64_t kPieceBlocks = kPieceHalves / 2;                                                   \
    const int64_t step = work.blocks * kBlockBytes;                                                      \
    for (int64_t group = 0; group < work.groups; group++) {                                              \
      const int64_t first = group * work.group_blocks;                                                   \
      std::memset(totals, 0, static_cast<size_t>(work.rows * kUnitOutputs) * sizeof *totals);            \
      for (int64_t block = first; block < first + work.group_blocks; block += kPieceBlocks) {            \
        const int64_t blocks = least(kPieceBlocks, first + work.group_blocks - block);                   \
        const uint8_t* weight = work.weight + block * step;                                              \
        const uint8_t* tables = work.tables + 2 * block * kIndices * kTableBytes;                        \
        if (work.rows <= kFewRows) {                                                                     \
          for (int64_t row = 0; row < work.rows; row++) {                                                \
            add_row<true>(tables + row * work.table_stride, weight, blocks, totals + row * kUnitOutputs);\
          }                                                                                              \
          continue;                                                                                      \
        }                                                                                                \
        unpack(weight, blocks, panel);                                                                   \
        for (int64_t row = 0; row < work.rows; row++) {                                                  \
          add_row<false>(tables + row * work.table_stride, panel, blocks, totals + row * kUnitOutputs);  \
        }                                                                                                \
      }                                                                                                  \
      finish(work, totals, kUnitOutputs, 0, work.rows, 0, work.outputs, group);                          \
    }                                                                                                    \
  }

}  // namespace fiftyfold
