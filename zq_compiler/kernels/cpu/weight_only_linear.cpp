// Linear whose weight alone is quantized: y = x @ w.T + bias, w[j][k] = (value(code[j][k]) - zero) * scale[j][k / group].
//
// The codes of sixteen outputs lie side by side, so that a vector of scales serves a whole group of K and sums need no
// reduction. They are decoded a chunk of K at a time into a buffer of floats in cache, the reference's values to the
// last bit, and multiplied from there with every row of x: with many, the product runs at the rate of a float one. One
// row, as in decoding, is multiplied with the values where they are made, in registers.

#include <torch/library.h>

#include <array>
#include <cstring>
#include <string_view>
#include <tuple>
#include <utility>

#include "rows.h"

namespace {

using namespace zq;

#ifdef __AVX512F__
constexpr int kRegisters = 24;  // of sums, in sixteen lanes; the others hold weights and activations
#else
constexpr int kRegisters = 6;
#endif
constexpr int kVectors = 4;                    // of outputs, of a task
constexpr int64_t kBlock = kVectors * kLanes;  // outputs of a task
constexpr int64_t kCodes = 16;                 // as many of one output end where a word of 16 bits does
constexpr int64_t kChunk = 64;                 // features decoded at a time: 16 KB of a block
constexpr int kTileRows = 6;
constexpr int64_t kRowBlock = 32 * kTileRows;  // rows of x whose sums a task keeps in cache

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// --- formats --------------------------------------------------------------------------------------------------------
// Each has the value, over kFactor, of a code in the highest bits of a word. Of kPairs outputs j and j + 8 lie in the
// words of one lane of 32 bits, not as they come: integers are widened in place.

template <int kBits_>
struct Integer {
  static constexpr int kBits = kBits_;
  static constexpr float kFactor = 1;
  static constexpr bool kPairs = true;
  static constexpr bool kZeros = false;
  static Floats value(Words top) { return to_floats<kBits>(top); }
};

// Integers of which one in each group stands for zero.
template <int kBits_>
struct Asymmetric : Integer<kBits_> {
  static constexpr bool kZeros = true;
};

// A code is a float16 whose exponent lacks its highest bits. Subnormals are float16's too, which the conversion knows.
template <int kExponent, int kMantissa>
struct Minifloat {
  static constexpr int kBits = 1 + kExponent + kMantissa;
  static constexpr float kFactor = 1 << (16 - (1 << (kExponent - 1)));  // 2^(15 - bias)
  static constexpr bool kPairs = false;
  static constexpr bool kZeros = false;
  static Floats value(Words top) {
    constexpr int kMask = 0x8000 | ((1 << (kExponent + kMantissa)) - 1) << (10 - kMantissa);
    return of_half(shift_signed(top, 5 - kExponent) & Words(int16_t(kMask)));
  }
};

struct Binary {
  static constexpr int kBits = 1;
  static constexpr float kFactor = 1;
  static constexpr bool kPairs = false;
  static constexpr bool kZeros = false;
  static Floats value(Words top) { return of_half((top & Words(int16_t(0x8000))) | Words(int16_t(0x3C00))); }
};

// Code j of the kCodes in kBits words, in the highest bits; what is below it is of no matter.
template <int kBits, int j>
Words code(const Words (&words)[kBits]) {
  constexpr int kWord = j * kBits / 16, kEnd = j * kBits % 16 + kBits;
  if constexpr (kEnd <= 16) return words[kWord] << (16 - kEnd);
  else return words[kWord] >> (kEnd - 16) | words[kWord + 1] << (32 - kEnd);
}

// rounded<T> of a weight's value, which is finite: half the instructions for bfloat16.
template <typename T>
Floats rounded_value(Floats w) {
  if constexpr (!std::is_same_v<T, at::BFloat16>) {
    return rounded<T>(w);
  } else {
    const Ints bits = bits_of(w), odd = (bits >> 16) & Ints(1);
    return of_bits((bits + Ints(0x7FFF) + odd) & Ints(int32_t(0xFFFF0000)));
  }
}

// --- decoding -------------------------------------------------------------------------------------------------------

// A weight in blocks of sixteen outputs.
struct Weight {
  const int16_t* words;  // [ceil(n/kLanes), ceil(k/kCodes) * bits, kLanes]
  const void* scale;     // [ceil(n/kLanes), groups, kLanes], float16 or, of whole rows, float32; or zeros behind: 2 groups
  int64_t n, k, bits, groups, group;
  bool half, zeros;

  const int16_t* codes(int64_t i, int64_t from) const {
    return words + (i / kLanes * ceil_div(k, kCodes) + from / kCodes) * bits * kLanes;
  }
  // Zero points lie as many groups further on.
  Floats scales(int64_t i, int64_t from, int64_t further = 0) const {
    const int64_t at = (i / kLanes * (zeros ? 2 * groups : groups) + from / group + further) * kLanes;
    return half ? load(static_cast<const at::Half*>(scale) + at, kAll) : load(static_cast<const float*>(scale) + at);
  }
};

// put(j, values) for each of the kCodes codes of sixteen outputs, j known when this is compiled; times kFactor.
template <typename Format, typename Put>
void for_each_code(const int16_t* codes, Put put) {
  Words words[Format::kBits];
#pragma GCC unroll 8
  for (int w = 0; w < Format::kBits; ++w) words[w] = load(codes + w * kLanes);
  [&]<int... j>(std::integer_sequence<int, j...>) {
    (put(std::integral_constant<int, j>(), Format::value(code<Format::kBits, j>(words))), ...);
  }(std::make_integer_sequence<int, kCodes>());
}

// The same into memory, out of line: what is rare must not take registers from what is not.
template <typename Format>
[[gnu::noinline]] void store_codes(const int16_t* codes, float* to) {
  for_each_code<Format>(codes, [&](int j, Floats value) { store(to + j * kLanes, value); });
}

// take(k, values, parity) for each feature k in [from, end) of outputs i and up, zero points taken off, and before the
// first of each group begin(scales). The parity of k is known when this is compiled, where it differs at all.
template <typename Format, typename Begin, typename Take>
void for_each_feature(const Weight& weight, int64_t i, int64_t from, int64_t end, Begin begin, Take take) {
  const int16_t* codes = weight.codes(i, from);
  int64_t group_end = from;
  [[maybe_unused]] Floats zero = 0.0f;
  const auto less_zero = [&](Floats values) {
    if constexpr (Format::kZeros) return values - zero;
    else return values;
  };
  const auto begin_at = [&](int64_t k) {
    begin(weight.scales(i, k) * Format::kFactor);
    if constexpr (Format::kZeros) zero = weight.scales(i, k, weight.groups);
    group_end = std::min((k / weight.group + 1) * weight.group, end);
  };
  for (; from < end; from += kCodes, codes += Format::kBits * kLanes) {
    if (from == group_end) begin_at(from);
    if (from + kCodes <= group_end) [[likely]] {
      for_each_code<Format>(codes, [&](auto j, Floats values) {
        take(from + j, less_zero(values), std::integral_constant<int, j % 2>());
      });
    } else {  // the group ends amid them, or the row
      float values[kCodes * kLanes];
      store_codes<Format>(codes, values);
      for (int64_t k = from; k < std::min(from + kCodes, end); ++k) {
        if (k == group_end) begin_at(k);
        take(k, less_zero(load(values + (k - from) * kLanes, kAll)), std::integral_constant<int, 0>());
      }
    }
  }
}

// Features [from, end) of outputs i and up, as the reference rounds them to T: [end - from, kLanes].
template <typename Format, typename T>
void decode(const Weight& weight, int64_t i, int64_t from, int64_t end, float* to) {
  Floats scale = 0.0f;
  for_each_feature<Format>(weight, i, from, end, [&](Floats s) { scale = s; }, [&](int64_t k, Floats w, auto) {
    store(to + (k - from) * kLanes, rounded_value<T>(w * scale));
  });
}

// One row of x times outputs i and up. Where no value is rounded, a scale multiplies its group's sum and not each value.
template <typename Format, typename T>
void dot(const Weight& weight, int64_t i, const float* x, float* sums) {
  Floats acc[] = {0.0f, 0.0f}, scale = 0.0f, total = 0.0f;
  constexpr bool kOnce = std::is_same_v<T, float>;
  const auto end_group = [&] {
    total = fmadd(acc[0] + acc[1], scale, total);
    acc[0] = acc[1] = 0.0f;
  };
  const auto begin = [&](Floats s) {
    if constexpr (kOnce) end_group();
    scale = s;
  };
  for_each_feature<Format>(weight, i, 0, weight.k, begin, [&](int64_t k, Floats w, auto parity) {
    acc[parity] = fmadd(Floats(x[k]), kOnce ? w : rounded_value<T>(w * scale), acc[parity]);
  });
  if constexpr (kOnce) end_group();
  store(sums, kOnce ? total : acc[0] + acc[1]);
}

using Decode = void (*)(const Weight&, int64_t, int64_t, int64_t, float*);
using Dot = void (*)(const Weight&, int64_t, const float*, float*);

struct Format {
  std::string_view name;
  int bits;
  bool pairs, zeros;
  std::array<Decode, 3> decode;  // to float32, bfloat16, float16
  std::array<Dot, 3> dot;
};

template <typename F>
constexpr Format format(std::string_view name) {
  return {name, F::kBits, F::kPairs, F::kZeros, {decode<F, float>, decode<F, at::BFloat16>, decode<F, at::Half>},
          {dot<F, float>, dot<F, at::BFloat16>, dot<F, at::Half>}};
}

constexpr Format kFormats[] = {
    format<Integer<8>>("int8"),          format<Integer<4>>("int4"),          format<Integer<3>>("int3"),
    format<Integer<2>>("int2"),          format<Integer<2>>("ternary"),       format<Binary>("binary"),
    format<Minifloat<4, 3>>("fp8_e4m3"), format<Minifloat<5, 2>>("fp8_e5m2"), format<Minifloat<3, 2>>("fp6_e3m2"),
    format<Minifloat<2, 3>>("fp6_e2m3"), format<Minifloat<2, 1>>("fp4_e2m1"), format<Minifloat<3, 0>>("fp4_e3m0"),
    format<Asymmetric<4>>("int4_asym"),  format<Asymmetric<3>>("int3_asym"),  format<Asymmetric<2>>("int2_asym"),
};

// --- the product ----------------------------------------------------------------------------------------------------

// sums[r][i] += sum over k of x[r][k] * w[i / kLanes][k][i % kLanes], of Rows rows and Vectors vectors of outputs.
template <int Rows, int Vectors>
void multiply(const float* x, int64_t x_stride, const float* w, int64_t k, float* sums) {
  Floats acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[r][v] = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    Floats b[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) b[v] = load(w + (v * kChunk + i) * kLanes, kAll);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Floats a = x[r * x_stride + i];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] = fmadd(a, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* sum = sums + r * kBlock + v * kLanes;
      store(sum, load(sum, kAll) + acc[r][v]);
    }
}

// As many vectors as the registers have room for, a power of two.
constexpr int vectors(int rows) {
  return rows * 4 <= kRegisters ? 4 : rows * 2 <= kRegisters ? 2 : 1;
}

template <int Rows>
void multiply_block(const float* x, int64_t x_stride, const float* w, int64_t k, float* sums) {
  constexpr int kWide = vectors(Rows);
  for (int v = 0; v < kVectors; v += kWide)
    multiply<Rows, kWide>(x, x_stride, w + v * kChunk * kLanes, k, sums + v * kLanes);
}

constexpr decltype(&multiply_block<1>) kHeights[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>,
                                                     multiply_block<4>, multiply_block<5>, multiply_block<6>};

template <typename T>
struct Linear {
  const Rows& x;  // float32
  Weight weight;
  Decode decode;
  Dot dot;
  const float* bias;  // [n] or null
  T* y;               // [rows, n]

  // Rows [begin, end) of the outputs from `column` on.
  void block(int64_t begin, int64_t end, int64_t column) const {
    alignas(64) float sums[kRowBlock * kBlock];
    const int64_t width = std::min(kBlock, weight.n - column);
    if (end - begin == 1)
      for (int64_t v = 0; v < width; v += kLanes) dot(weight, column + v, x.row<float>(begin), sums + v);
    else product(begin, end, column, width, sums);
    for (int64_t row = begin; row < end; ++row)
      for_each_vector(width, [&](int64_t i, Lanes lanes) {
        Floats sum = load(sums + (row - begin) * kBlock + i, kAll);
        if (bias) sum = sum + load(bias + column + i, lanes);
        store(y + row * weight.n + column + i, lanes, sum);
      });
  }

  void product(int64_t begin, int64_t end, int64_t column, int64_t width, float* sums) const {
    alignas(64) float w[kChunk * kBlock];
    std::fill_n(sums, (end - begin) * kBlock, 0.0f);
    if (width < kBlock) std::fill_n(w, kChunk * kBlock, 0.0f);  // what is multiplied and not stored
    for (int64_t from = 0; from < weight.k; from += kChunk) {
      const int64_t to = std::min(from + kChunk, weight.k);
      for (int64_t v = 0; v < width; v += kLanes) decode(weight, column + v, from, to, w + v * kChunk);
      for (int64_t row = begin; row < end; row += kTileRows)
        kHeights[std::min<int64_t>(kTileRows, end - row) - 1](x.row<float>(row) + from, x.stride, w, to - from,
                                                              sums + (row - begin) * kBlock);
    }
  }

  void run() const {
    const int64_t columns = ceil_div(weight.n, kBlock), row_blocks = ceil_div(x.count, kRowBlock);
    at::parallel_for(0, row_blocks * columns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / columns;
        block(x.count * i / row_blocks, x.count * (i + 1) / row_blocks, task % columns * kBlock);
      }
    });
  }
};

const Format& format_of(const char* op, std::string_view name) {
  for (const Format& format : kFormats)
    if (format.name == name) return format;
  TORCH_CHECK(false, op, ": unknown format ", name);
}

// Rows of values as blocks of sixteen: [n, width] -> [ceil(n/kLanes), width, kLanes], zeros where there is no row.
template <typename T>
Tensor block_rows(const Tensor& rows, int64_t width, bool pairs) {
  const Tensor from = rows.contiguous();
  const int64_t n = rows.size(0), bytes = rows.size(1) * rows.element_size();
  const auto options = rows.options().dtype(c10::CppTypeToScalarType<T>::value);
  Tensor blocks = at::empty({ceil_div(n, kLanes), width, kLanes}, options);
  T* to = blocks.mutable_data_ptr<T>();
  at::parallel_for(0, blocks.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> row(width);
    for (int64_t i = begin * kLanes; i < end * kLanes; ++i) {
      std::fill(row.begin(), row.end(), T(0));
      if (i < n) std::memcpy(row.data(), static_cast<const char*>(from.const_data_ptr()) + i * bytes, bytes);
      const int64_t j = i % kLanes, lane = pairs ? j % 8 * 2 + j / 8 : j;
      for (int64_t w = 0; w < width; ++w) to[(i / kLanes * width + w) * kLanes + lane] = row[w];
    }
  });
  return blocks;
}

std::tuple<Tensor, Tensor> pack_codes(const Tensor& w_packed, const Tensor& w_scale, std::string_view format_name) {
  constexpr const char* op = "pack_codes";
  const Format& format = format_of(op, format_name);
  TORCH_CHECK(w_packed.dim() == 2 && w_packed.scalar_type() == at::kByte && w_packed.numel() > 0, op,
              ": w_packed must be Byte [N, bytes], not empty, got ", w_packed.scalar_type(), " ", w_packed.sizes());
  TORCH_CHECK(w_scale.dim() == 2 && w_scale.size(0) == w_packed.size(0) &&
                  (w_scale.scalar_type() == at::kHalf || w_scale.scalar_type() == at::kFloat),
              op, ": w_scale must be Half or Float [N, groups], got ", w_scale.scalar_type(), " ", w_scale.sizes());
  const int64_t words = ceil_div(w_packed.size(1), 2 * format.bits) * format.bits, groups = w_scale.size(1);
  return {block_rows<int16_t>(w_packed, words, format.pairs),
          w_scale.scalar_type() == at::kHalf ? block_rows<at::Half>(w_scale, groups, false)
                                             : block_rows<float>(w_scale, groups, false)};
}

Tensor weight_only_linear(const Tensor& x, const Tensor& codes, const Tensor& w_scale,
                          const std::optional<Tensor>& bias, std::string_view format_name, int64_t group, int64_t n) {
  constexpr const char* op = "weight_only_linear";
  const Rows given(op, "x", x);
  const Rows rows(op, "x", given.tensor.to(at::kFloat));
  const Format& format = format_of(op, format_name);
  TORCH_CHECK(group >= 0 && n > 0, op, ": group must not be negative and n be positive, got ", group, " and ", n);
  const int64_t k = rows.k, groups = group ? ceil_div(k, group) : 1, blocks = ceil_div(n, kLanes);
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType dtype, std::vector<int64_t> shape) {
    const at::IntArrayRef wanted(shape);
    TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == wanted, op, ": ", name, " must be ", dtype, " ", wanted,
                " (from pack_codes, for N=", n, ", K=", k, "), got ", t.scalar_type(), " ", t.sizes());
  };
  check("codes", codes, at::kShort, {blocks, ceil_div(k, kCodes) * format.bits, kLanes});
  check("scale", w_scale, group ? at::kHalf : at::kFloat, {blocks, format.zeros ? 2 * groups : groups, kLanes});
  std::optional<Tensor> offset;
  if (bias) {
    TORCH_CHECK(bias->is_floating_point(), op, ": bias must be a float dtype, got ", bias->scalar_type());
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [", n, "], got ", bias->sizes());
    offset = bias->to(at::kFloat).contiguous();
  }
  const Tensor words = codes.contiguous(), scale = w_scale.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  const Weight weight{words.const_data_ptr<int16_t>(), scale.const_data_ptr(), n,
                      k, format.bits, groups, group ? group : k, group != 0, format.zeros};
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int dtype = std::is_same_v<T, float> ? 0 : std::is_same_v<T, at::BFloat16> ? 1 : 2;
    Linear<T>{rows, weight, format.decode[dtype], format.dot[dtype], offset ? offset->const_data_ptr<float>() : nullptr,
              y.mutable_data_ptr<T>()}
        .run();
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("pack_codes(Tensor w_packed, Tensor w_scale, str format) -> (Tensor codes, Tensor scale)");
  m.def(
      "weight_only_linear(Tensor x, Tensor codes, Tensor scale, Tensor? bias, str format, int group, int n) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("pack_codes", &pack_codes);
  m.impl("weight_only_linear", &weight_only_linear);
}
