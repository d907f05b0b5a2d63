// The packed linear layer: how its work is cut into pieces for caches and threads.
#include <algorithm>
#include <cstring>

#include "api.h"
#include "floats.h"
#include "paths.h"
#include "scratch.h"
#include "threads.h"

namespace fiftyfold {
namespace {

// Products below which a second thread costs more than it saves.
constexpr double kSerialProducts = 1.0e6;
// Tokens for each thread from which on threads share the tokens rather than the outputs: fewer where they would read
// tables from each other's caches.
constexpr int64_t kTokensToShare = 48, kTabledTokensToShare = 8;
// Units of outputs from which on making tables pays: that takes as long as a row's products with one of them.
constexpr int64_t kUnitsToTabulate = 4;
// What the tables of tokens that are multiplied together may take of the second cache.
constexpr int64_t kTableMemory = 256 * 1024;
// Entries below which one thread quantizes for all.
constexpr int64_t kSerialEntries = 16384;

// Tokens in integers, and room for float32 rows where the tensors have another type.
struct Tokens {
  int8_t* codes;
  float* scale;
  int32_t* sums;
  uint8_t* tables;  // or null
  float* outputs;
  float* row;
};

class Linear {
 public:
  explicit Linear(const FfLinear& call)
      : call_(call),
        path_(current_path()),
        grid_{call.activation_bits, call.full_range != 0, call.clip, call.largest},
        arrangement_{call.outputs, call.inputs, call.groups, call.weight_bits, call.planes != 0},
        type_(static_cast<FloatType>(call.float_type)) {
    if (arrangement_.planes && path_.tabulate) table_bytes_ = path_.table_bytes(arrangement_.padded_inputs());
  }

  void run() const {
    const double products = static_cast<double>(call_.tokens) * call_.outputs * call_.inputs * grid_.planes();
    const int threads = products < kSerialProducts ? 1 : thread_count();
    if (threads <= 1) {
      run_tokens(0, call_.tokens);
    } else if (call_.tokens >= (table_bytes_ ? kTabledTokensToShare : kTokensToShare) * threads) {
      auto share = [&](int64_t t) { run_tokens(call_.tokens * t / threads, call_.tokens * (t + 1) / threads); };
      for_each_task(threads, share);
    } else {
      run_outputs(threads);
    }
  }

 private:
  void run_tokens(int64_t begin, int64_t end) const {
    static thread_local Scratch scratch;
    const int64_t most = least(tokens_at_once(), end - begin);
    const Tokens tokens = lay_out(scratch, most);
    for (int64_t first = begin; first < end; first += most) {
      const int64_t last = least(first + most, end);
      for (int64_t token = first; token < last; token++) quantize(tokens, token, token - first, tokens.row);
      multiply(tokens, first, 0, last - first, 0, arrangement_.units());
    }
  }

  void run_outputs(int threads) const {
    static thread_local Scratch scratch;
    const Tokens tokens = lay_out(scratch, call_.tokens);
    if (call_.tokens * call_.inputs < kSerialEntries) {
      for (int64_t token = 0; token < call_.tokens; token++) quantize(tokens, token, token, tokens.row);
    } else {
      auto share = [&](int64_t t) {
        static thread_local Scratch own;
        float* row = reinterpret_cast<float*>(own.reserve(aligned(call_.inputs * 4)));
        const int64_t end = call_.tokens * (t + 1) / threads;
        for (int64_t token = call_.tokens * t / threads; token < end; token++) quantize(tokens, token, token, row);
      };
      for_each_task(threads, share);
    }
    const int64_t units = arrangement_.units(), most = tokens_at_once();
    auto share = [&](int64_t t) {
      for (int64_t first = 0; first < call_.tokens; first += most) {
        const int64_t count = least(most, call_.tokens - first);
        multiply(tokens, 0, first, count, units * t / threads, units * (t + 1) / threads);
      }
    };
    for_each_task(threads, share);
  }

  Tokens lay_out(Scratch& scratch, int64_t count) const {
    const size_t codes = aligned(count * row_bytes()), scale = aligned(count * 4);
    const size_t sums = aligned(count * call_.groups * 4);
    const size_t tables = static_cast<size_t>(count * grid_.planes() * table_bytes_);
    const bool converts = type_ != FloatType::float32;
    const size_t outputs = converts ? aligned(count * call_.outputs * 4) : 0;
    uint8_t* at = scratch.reserve(tables + codes + scale + sums + outputs + (converts ? aligned(call_.inputs * 4) : 0));
    Tokens tokens;
    tokens.tables = table_bytes_ ? at : nullptr;
    tokens.codes = reinterpret_cast<int8_t*>(at += tables);
    tokens.scale = reinterpret_cast<float*>(at += codes);
    tokens.sums = reinterpret_cast<int32_t*>(at += scale);
    tokens.outputs = reinterpret_cast<float*>(at += sums);
    tokens.row = reinterpret_cast<float*>(at += outputs);
    return tokens;
  }

  void quantize(const Tokens& tokens, int64_t token, int64_t place, float* row) const {
    const uint8_t* x = static_cast<const uint8_t*>(call_.x) + token * call_.x_stride * size_of(type_);
    const float* values = reinterpret_cast<const float*>(x);
    if (type_ != FloatType::float32) {
      read_floats(x, type_, call_.inputs, row);
      values = row;
    }
    const int64_t padded = arrangement_.group_blocks() * arrangement_.block_inputs();
    path_.quantize(grid_, values, call_.groups, arrangement_.group_inputs(), padded,
                   tokens.codes + place * row_bytes(), tokens.scale + place, tokens.sums + place * call_.groups);
    if (!tokens.tables) return;
    const int64_t inputs = arrangement_.padded_inputs();
    for (int64_t plane = place * grid_.planes(); plane < (place + 1) * grid_.planes(); plane++) {
      path_.tabulate(tokens.codes + plane * inputs, inputs, tokens.tables + plane * table_bytes_);
    }
  }

  // Tokens from `place` on in `tokens`, which are those from `first + place` on of the call.
  void multiply(const Tokens& tokens, int64_t first, int64_t place, int64_t count, int64_t begin, int64_t end) const {
    const bool converts = type_ != FloatType::float32;
    float* y = converts ? tokens.outputs + place * call_.outputs
                        : static_cast<float*>(call_.y) + (first + place) * call_.outputs;
    UnitWork work;
    work.codes = tokens.codes + place * row_bytes();
    work.stride = arrangement_.padded_inputs();
    work.tables = tokens.tables ? tokens.tables + place * grid_.planes() * table_bytes_ : nullptr;
    work.table_stride = table_bytes_;
    work.rows = count * grid_.planes();
    work.planes = grid_.planes();
    work.bits = call_.weight_bits;
    work.groups = call_.groups;
    work.group_blocks = arrangement_.group_blocks();
    work.token_scale = tokens.scale + place;
    work.token_sums = tokens.sums + place * call_.groups;
    work.weight_scale_stride = call_.outputs;
    work.y_stride = call_.outputs;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t output = arrangement_.first_output(unit);
      work.weight = blocks_of(unit);
      work.blocks = arrangement_.is_wide(unit) ? kUnitBlocks : 1;
      work.outputs = least(work.blocks * kBlockOutputs, call_.outputs - output);
      work.weight_scale = call_.scale + output;
      work.bias = call_.bias ? call_.bias + output : nullptr;
      work.y = y + output;
      path_.multiply[call_.weight_bits - 1](work);
    }
    if (converts && begin < end) {
      const int64_t from = arrangement_.first_output(begin);
      const int64_t to = end == arrangement_.units() ? call_.outputs : arrangement_.first_output(end);
      for (int64_t token = 0; token < count; token++) {
        const int64_t at = (first + place + token) * call_.outputs + from;
        write_floats(y + token * call_.outputs + from, to - from, type_, static_cast<uint16_t*>(call_.y) + at);
      }
    }
  }

  // A unit's weights as the path reads them: what was arranged for lookups may be read where there are none.
  const uint8_t* blocks_of(int64_t unit) const {
    const uint8_t* weight = call_.weight + arrangement_.first_byte(unit);
    if (!arrangement_.planes || table_bytes_ || !arrangement_.is_wide(unit)) return weight;
    static thread_local Scratch scratch;
    constexpr int64_t kStep = kUnitBlocks * kBlockBytes;
    uint8_t* blocks = scratch.reserve(static_cast<size_t>(arrangement_.blocks() * kStep));
    for (int64_t b = 0; b < arrangement_.blocks(); b++) from_planes(weight + b * kStep, blocks + b * kStep);
    return blocks;
  }

  int64_t tokens_at_once() const {
    if (!table_bytes_) return path_.tokens_at_once;
    return least(path_.tokens_at_once, std::max<int64_t>(1, kTableMemory / (table_bytes_ * grid_.planes())));
  }

  int64_t row_bytes() const { return arrangement_.padded_inputs() * grid_.planes(); }

  const FfLinear& call_;
  const Path& path_;
  const Grid grid_;
  const Arrangement arrangement_;
  const FloatType type_;
  int64_t table_bytes_ = 0;  // of a row of codes; none where there are no tables
};

}  // namespace
}  // namespace fiftyfold

using fiftyfold::Arrangement;

int64_t ff_arranged_bytes(int64_t outputs, int64_t inputs, int64_t groups, int32_t bits) {
  return Arrangement{outputs, inputs, groups, bits}.bytes();
}

void ff_arrange(const int8_t* codes, int64_t outputs, int64_t inputs, int64_t groups, int32_t bits, uint8_t* to) {
  Arrangement arrangement{outputs, inputs, groups, bits};
  const bool pays = arrangement.wide_units() >= fiftyfold::kUnitsToTabulate;
  arrangement.planes = bits == 1 && pays && fiftyfold::current_path().tabulate;
  const fiftyfold::Label label = fiftyfold::Label::of(arrangement);
  std::memcpy(to + arrangement.label_byte(), &label, sizeof label);
  auto unit = [&](int64_t number) { fiftyfold::arrange_unit(arrangement, codes, number, to); };
  fiftyfold::for_each_task(arrangement.units(), unit);
}

int32_t ff_is_in_planes(const uint8_t* arranged, int64_t bytes) {
  return fiftyfold::Label::read(arranged, bytes).kind == fiftyfold::Label::kPlanes;
}

void ff_linear(const FfLinear* call) { fiftyfold::Linear(*call).run(); }
const char* ff_path() { return fiftyfold::current_path().name; }
const char* ff_supported_path(int32_t index) {
  const fiftyfold::Path* path = fiftyfold::supported_paths()[index];
  return path ? path->name : nullptr;
}
int32_t ff_choose_path(const char* name) { return fiftyfold::choose_path(name); }
int32_t ff_threads() { return fiftyfold::thread_count(); }
void ff_compute_alone() { fiftyfold::compute_alone(); }
