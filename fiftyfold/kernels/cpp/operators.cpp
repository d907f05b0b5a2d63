// The operators fiftyfold::packed_linear and fiftyfold::packed_embedding on CPUs, for torch's dispatcher.
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "api.h"
#include "arrangement.h"
#include "floats.h"
#include "torch_shim.h"

namespace fiftyfold {
namespace {

void require(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(message);
}

FloatType float_type(int32_t type, const char* message) {
  if (type == shim.aoti_torch_dtype_float32()) return FloatType::float32;
  if (type == shim.aoti_torch_dtype_bfloat16()) return FloatType::bfloat16;
  require(type == shim.aoti_torch_dtype_float16(), message);
  return FloatType::float16;
}

std::optional<Tensor> optional_tensor(Arguments& arguments) {
  StableValue value;
  if (!arguments.optional(&value)) return std::nullopt;
  return std::optional<Tensor>(std::in_place, reinterpret_cast<TensorHandle>(value));
}

float optional_number(Arguments& arguments, float otherwise) {
  StableValue value;
  if (!arguments.optional(&value)) return otherwise;
  double number;
  std::memcpy(&number, &value, sizeof number);
  return static_cast<float>(number);
}

// All arguments are read, and so owned, before the first is refused.
struct LinearArguments {
  Tensor x, weight, scale;
  std::optional<Tensor> bias;
  int64_t bits, activation_bits;
  bool full_range;
  float clip;
  std::optional<Tensor> largest;

  explicit LinearArguments(Arguments from)
      : x(from.tensor()),
        weight(from.tensor()),
        scale(from.tensor()),
        bias(optional_tensor(from)),
        bits(from.integer()),
        activation_bits(from.integer()),
        full_range(from.flag()),
        clip(optional_number(from, INFINITY)),
        largest(optional_tensor(from)) {}
};

constexpr char kNotArranged[] =
    "packed_linear: the weight was not arranged for an input of this width, these scales and these bits";

void check_linear(const LinearArguments& a) {
  const int32_t float32 = shim.aoti_torch_dtype_float32();
  require(a.bits == 1 || a.bits == 2, "packed_linear: weights must have 1 or 2 bits");
  require(a.activation_bits == 4 || a.activation_bits == 8 || a.activation_bits == 16,
          "packed_linear: activations must have 4, 8 or 16 bits");
  require(!a.full_range || a.activation_bits < 16, "packed_linear: 16 bits have no full range");
  require(a.clip > 0, "packed_linear: clip must be positive");
  require(a.x.dim() >= 1, "packed_linear: the input must have a dimension");
  require(a.scale.dim() == 2 && a.scale.type() == float32 && a.scale.is_contiguous() && a.scale.numel() > 0,
          "packed_linear: scales must be a contiguous float32 matrix (groups, outputs)");
  const int64_t inputs = a.x.size(a.x.dim() - 1), groups = a.scale.size(0), outputs = a.scale.size(1);
  require(inputs > 0 && inputs % groups == 0, "packed_linear: the groups do not divide the inputs");
  require(inputs <= (a.activation_bits == 16 ? 1 << 16 : 1 << 17), "packed_linear: so many products overflow int32");
  const Arrangement expected{outputs, inputs, groups, static_cast<int>(a.bits)};
  require(a.weight.type() == shim.aoti_torch_dtype_uint8() && a.weight.dim() == 1 && a.weight.is_contiguous() &&
              a.weight.numel() == expected.bytes(),
          kNotArranged);
  const Label label = Label::read(a.weight.data<uint8_t>(), a.weight.numel());
  require(label.outputs == outputs && label.inputs == inputs && label.groups == groups && label.bits == a.bits &&
              label.kind != Label::kTables,
          kNotArranged);
  require(!a.bias || (a.bias->dim() == 1 && a.bias->size(0) == outputs),
          "packed_linear: the bias must have one entry for each output");
  require(!a.largest || (a.largest->numel() == 1 && a.largest->type() == float32),
          "packed_linear: the largest magnitude must be one float32 number");
}

// The bias in float32, in `room` if it has another type.
const float* read_bias(const Tensor& bias, std::vector<float>& room) {
  const FloatType type = float_type(bias.type(), "the bias must be float32, bfloat16 or float16");
  const int64_t size = bias.size(0);
  if (type == FloatType::float32 && bias.is_contiguous()) return bias.data<float>();
  room.resize(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; i++) {
    const uint8_t* at = bias.data<uint8_t>() + i * bias.stride(0) * size_of(type);
    if (type == FloatType::float32) std::memcpy(&room[static_cast<size_t>(i)], at, sizeof(float));
    else read_floats(at, type, 1, &room[static_cast<size_t>(i)]);
  }
  return room.data();
}

// The distance between neighbouring tokens, if one distance tells where all of them are.
bool token_stride(const Tensor& x, int64_t* stride) {
  const int64_t dim = x.dim();
  if (x.stride(dim - 1) != 1 && x.size(dim - 1) != 1) return false;
  *stride = x.size(dim - 1);
  int64_t expected = -1;
  for (int64_t d = dim - 1; d-- > 0;) {
    if (x.size(d) == 1) continue;
    if (expected < 0) *stride = x.stride(d);
    else if (x.stride(d) != expected) return false;
    expected = x.stride(d) * x.size(d);
  }
  return true;
}

Tensor linear(const LinearArguments& a) {
  check_linear(a);
  const FloatType type = float_type(a.x.type(), "packed_linear: the input must be float32, bfloat16 or float16");
  const int64_t dim = a.x.dim();
  std::vector<int64_t> sizes(a.x.sizes(), a.x.sizes() + dim);
  FfLinear call{};
  call.inputs = sizes.back();
  call.outputs = sizes.back() = a.scale.size(1);
  Tensor y = Tensor::empty(sizes.data(), dim, a.x.type());
  std::optional<Tensor> copy;
  if (!token_stride(a.x, &call.x_stride)) {
    copy.emplace(a.x.contiguous(size_of(type)));
    call.x_stride = call.inputs;
  }
  std::vector<float> bias;
  call.x = (copy ? *copy : a.x).data<void>();
  call.tokens = y.numel() / call.outputs;
  call.weight = a.weight.data<uint8_t>();
  call.planes = ff_is_in_planes(call.weight, a.weight.numel());
  call.scale = a.scale.data<float>();
  call.groups = a.scale.size(0);
  call.bias = a.bias ? read_bias(*a.bias, bias) : nullptr;
  call.y = y.data<void>();
  call.largest = a.largest ? a.largest->data<float>() : nullptr;
  call.clip = a.clip;
  call.float_type = static_cast<int32_t>(type);
  call.weight_bits = static_cast<int32_t>(a.bits);
  call.activation_bits = static_cast<int32_t>(a.activation_bits);
  call.full_range = a.full_range;
  ff_linear(&call);
  return y;
}

void linear_operator(StableValue* stack, uint64_t, uint64_t) {
  stack[0] = reinterpret_cast<StableValue>(linear(LinearArguments(Arguments(stack))).release());
}

struct TableArguments {
  Tensor x, weight, scale;
  std::optional<Tensor> bias;
  int64_t bits;

  explicit TableArguments(Arguments from)
      : x(from.tensor()),
        weight(from.tensor()),
        scale(from.tensor()),
        bias(optional_tensor(from)),
        bits(from.integer()) {}
};

void check_table_linear(const TableArguments& a) {
  constexpr char kOther[] = "table_linear: the weight was not arranged for an input of this width and these scales";
  require(a.bits == 1 || a.bits == 2, "table_linear: weights must have 1 or 2 bits");
  require(a.x.dim() >= 1, "table_linear: the input must have a dimension");
  require(a.scale.dim() == 1 && a.scale.type() == shim.aoti_torch_dtype_float32() && a.scale.is_contiguous(),
          "table_linear: scales must be a contiguous float32 vector");
  const int64_t inputs = a.x.size(a.x.dim() - 1), outputs = a.scale.size(0);
  require(a.weight.type() == shim.aoti_torch_dtype_uint8() && a.weight.dim() == 1 && a.weight.is_contiguous() &&
              a.weight.numel() == ff_tabled_bytes(outputs, inputs, static_cast<int32_t>(a.bits)),
          kOther);
  const Label label = Label::read(a.weight.data<uint8_t>(), a.weight.numel());
  require(label.outputs == outputs && label.inputs == inputs && label.bits == a.bits && label.kind == Label::kTables,
          kOther);
  require(!a.bias || (a.bias->dim() == 1 && a.bias->size(0) == outputs),
          "table_linear: the bias must have one entry for each output");
}

Tensor table_linear(const TableArguments& a) {
  check_table_linear(a);
  const FloatType type = float_type(a.x.type(), "table_linear: the input must be float32, bfloat16 or float16");
  std::vector<int64_t> sizes(a.x.sizes(), a.x.sizes() + a.x.dim());
  const int64_t inputs = sizes.back(), outputs = sizes.back() = a.scale.size(0);
  Tensor y = Tensor::empty(sizes.data(), a.x.dim(), a.x.type());
  std::optional<Tensor> copy;
  if (!a.x.is_contiguous()) copy.emplace(a.x.contiguous(size_of(type)));
  const void* x = (copy ? *copy : a.x).data<void>();
  const int64_t tokens = outputs ? y.numel() / outputs : 0;
  const bool converts = type != FloatType::float32;
  std::vector<float> rows, values, bias;
  if (converts) {
    rows.resize(static_cast<size_t>(tokens * inputs));
    values.resize(static_cast<size_t>(tokens * outputs));
    read_floats(x, type, tokens * inputs, rows.data());
  }
  ff_table_linear(converts ? rows.data() : static_cast<const float*>(x), tokens, inputs, outputs,
                  static_cast<int32_t>(a.bits), a.weight.data<uint8_t>(), a.scale.data<float>(),
                  a.bias ? read_bias(*a.bias, bias) : nullptr, converts ? values.data() : y.data<float>());
  if (converts) write_floats(values.data(), tokens * outputs, type, y.data<uint16_t>());
  return y;
}

void table_linear_operator(StableValue* stack, uint64_t, uint64_t) {
  stack[0] = reinterpret_cast<StableValue>(table_linear(TableArguments(Arguments(stack))).release());
}

struct EmbeddingArguments {
  Tensor tokens, packed, scale;
  int64_t bits, columns;
  int32_t type;

  explicit EmbeddingArguments(Arguments from)
      : tokens(from.tensor()),
        packed(from.tensor()),
        scale(from.tensor()),
        bits(from.integer()),
        columns(from.integer()),
        type(from.type()) {}
};

std::vector<int64_t> read_tokens(const Tensor& tokens) {
  const bool wide = tokens.type() == shim.aoti_torch_dtype_int64();
  require(wide || tokens.type() == shim.aoti_torch_dtype_int32(), "packed_embedding: tokens must be int32 or int64");
  std::optional<Tensor> copy;
  if (!tokens.is_contiguous()) copy.emplace(tokens.contiguous(wide ? 8 : 4));
  const Tensor& from = copy ? *copy : tokens;
  const size_t count = static_cast<size_t>(tokens.numel());
  if (wide) return std::vector<int64_t>(from.data<int64_t>(), from.data<int64_t>() + count);
  return std::vector<int64_t>(from.data<int32_t>(), from.data<int32_t>() + count);
}

Tensor embedding(const EmbeddingArguments& a) {
  const int64_t rows = a.scale.dim() == 2 ? a.scale.size(0) : 0;
  require(a.bits == 1 || a.bits == 2, "packed_embedding: weights must have 1 or 2 bits");
  require(a.scale.dim() == 2 && a.scale.size(1) == 1 && a.scale.type() == shim.aoti_torch_dtype_float16() &&
              a.scale.is_contiguous(),
          "packed_embedding: scales must be a float16 matrix (rows, 1)");
  const int64_t digits = a.bits == 2 ? 5 : 8;
  require(a.columns > 0 && a.packed.type() == shim.aoti_torch_dtype_uint8() && a.packed.dim() == 1 &&
              a.packed.is_contiguous() && a.packed.numel() == (rows * a.columns + digits - 1) / digits,
          "packed_embedding: the packed bytes do not fit the rows and columns");
  const FloatType type = float_type(a.type, "packed_embedding: values must be float32, bfloat16 or float16");
  std::vector<int64_t> sizes(a.tokens.sizes(), a.tokens.sizes() + a.tokens.dim());
  sizes.push_back(a.columns);
  Tensor y = Tensor::empty(sizes.data(), static_cast<int64_t>(sizes.size()), a.type);
  const std::vector<int64_t> tokens = read_tokens(a.tokens);
  FfEmbedding call{};
  call.tokens = tokens.data();
  call.count = static_cast<int64_t>(tokens.size());
  call.rows = rows;
  call.columns = a.columns;
  call.packed = a.packed.data<uint8_t>();
  call.packed_bytes = a.packed.numel();
  call.scale = a.scale.data<uint16_t>();
  call.y = y.data<void>();
  call.float_type = static_cast<int32_t>(type);
  call.bits = static_cast<int32_t>(a.bits);
  const int32_t status = ff_embedding(&call);
  if (status == 1) throw std::out_of_range("row numbers must be between 0 and " + std::to_string(rows - 1));
  require(status == 0, "packed_embedding: a byte is none that packing writes; the file was altered");
  return y;
}

void embedding_operator(StableValue* stack, uint64_t, uint64_t) {
  stack[0] = reinterpret_cast<StableValue>(embedding(EmbeddingArguments(Arguments(stack))).release());
}

}  // namespace
}  // namespace fiftyfold

const char* ff_attach(const char* torch_library) {
  static std::string problem;
  problem = fiftyfold::shim.find(torch_library);
  if (problem.empty()) {
    fiftyfold::use_threads(fiftyfold::shim.torch_parallel_for, fiftyfold::shim.torch_get_num_threads);
  }
  return problem.c_str();
}

int32_t ff_register_operators() {
  using namespace fiftyfold;
  static LibraryHandle library = nullptr;
  if (library) return 0;
  int32_t failed = shim.aoti_torch_library_init_impl("fiftyfold", "CPU", __FILE__, __LINE__, &library);
  if (!failed) failed = shim.aoti_torch_library_impl(library, "packed_linear", linear_operator);
  if (!failed) failed = shim.aoti_torch_library_impl(library, "packed_embedding", embedding_operator);
  if (!failed) failed = shim.aoti_torch_library_impl(library, "table_linear", table_linear_operator);
  return failed;
}
