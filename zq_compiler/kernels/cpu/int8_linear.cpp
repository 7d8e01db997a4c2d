// INT8 linear: y = (x_q @ w_q.T) * w_scale * x_scale + bias, as floats or rounded to integers; or the integers of
// gelu(y) / out_scale.
//
// A tile of kTileRows x kBlock int32 sums stays in registers over the whole of K, goes through a small buffer in L1, and
// is scaled, biased and converted before the next tile starts. One kernel serves every shape: with one row it streams
// the weight, with many rows it runs at the rate of the multiplications. With AMX, many rows are left to its tiles.

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>

#include "gelu.h"
#include "int8_product.h"
#include "int8_tiles.h"
#include "rows.h"

namespace {

using namespace zq;

constexpr int64_t kRowBlockBytes = 256 * 1024;  // activations that one task keeps in its L2 cache

// What `multiply` reads: x in place where it becomes unsigned on the way, at no cost beside vpdpbusd.
using Activation = std::conditional_t<std::is_same_v<Unsigned, uint8_t>, int8_t, Unsigned>;

constexpr int64_t kFewRows = 16;  // which vectors multiply as fast as tiles, half of whose lines they would leave empty

bool tall(int64_t rows) {
  return rows > kFewRows && have_tiles();
}

// Rows of x as they are multiplied, in place or in a buffer of this thread.
template <typename X = Activation>
struct Activations {
  const X* data;
  int64_t stride;

  Activations(const int8_t* x, int64_t rows, int64_t k) : stride(k) {
    thread_local std::vector<X> buffer;
    const auto reserve = [&](int64_t count) {
      if (int64_t(buffer.size()) < count) buffer.resize(count);
      data = buffer.data();
    };
    if constexpr (!std::is_same_v<X, int8_t>) {
      reserve(rows * k + kLanes);
      make_unsigned(x, rows * k, buffer.data());
    } else if (tall(rows) && (rows < kStripRows || k % kTileDepth)) {  // zeros fill the last tiles
      stride = round_up(k, kTileDepth);
      const int64_t count = std::max(rows, kStripRows) * stride;
      reserve(count);
      std::fill_n(buffer.begin(), count, 0);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * k, k, buffer.data() + r * stride);
    } else {
      data = x;
    }
  }
};

// What becomes of a vector of results, of columns c and up, on its way to y.
template <typename T>
struct Write {
  void operator()(T* y, Lanes lanes, Floats v, int64_t) const {
    store(y, lanes, v);
  }
};

template <typename D>  // D: the dtype that a linear, a GELU and a quantize of their own would hand on
struct WriteGelu {
  const Gelu& gelu;
  const float* out_scale;  // [n]

  void operator()(int8_t* y, Lanes lanes, Floats v, int64_t c) const {
    store(y, lanes, rounded<D>(gelu(rounded<D>(v))) / load(out_scale + c, lanes));
  }
};

template <typename T, typename Finish>
struct Linear {
  const int8_t* x;         // [m, k], k a multiple of kGroup
  const float* x_scale;    // [m] or null
  const int8_t* w;         // [ceil(n/kBlock), k/kGroup, kBlock, kGroup]
  const float* w_scale;    // [n]
  const int32_t* colsum;   // [n]
  const float* bias;       // [n] or null
  T* y;                    // [m, n]
  int64_t m, n, k;
  Finish finish;

  template <bool kAdded>  // to each x, 128
  void write(const int32_t* sums, int64_t row, int64_t rows, int64_t col) const {
    for (int64_t v = 0; v < kBlock && col + v < n; v += kLanes) {
      const int64_t c = col + v;
      const Lanes lanes = first_lanes(n - c);
      const Ints shift = kAdded ? load(colsum + c, lanes) << 7 : Ints(0);
      const Floats scale = load(w_scale + c, lanes);
      const Floats offset = bias ? load(bias + c, lanes) : 0.0f;
      for (int64_t r = 0; r < rows; ++r) {
        Floats out = to_floats(load(sums + r * kBlock + v) - shift) * scale;
        if (x_scale) out = out * x_scale[row + r];
        if (bias) out = out + offset;  // adding 0 would turn -0 into +0
        finish(y + (row + r) * n + c, lanes, out, c);
      }
    }
  }

  void prefetch(int64_t row, int64_t rows, int64_t col) const {  // the lines of y arrive while the sums are computed
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t c = 0; c < kBlock; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(y + r * n + col + c, 1);
  }

  // Rows [begin, end) of one weight block, in tiles of nearly equal height; `from` has the row `first` and on.
  void block(const Activations<>& from, int64_t first, int64_t begin, int64_t end, int64_t col) const {
    alignas(64) int32_t sums[kTileRows * kBlock];
    const int8_t* panel = w + col * k;
    const int64_t tiles = ceil_div(end - begin, kTileRows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + (end - begin) * t / tiles;
      const int64_t rows = begin + (end - begin) * (t + 1) / tiles - row;
      prefetch(row, rows, col);
      kHeights<Activation, kVectors>[rows - 1](from.data + (row - first) * from.stride, from.stride, panel,
                                               kBlock * kGroup, k / kGroup, nullptr, sums, kBlock);
      write<true>(sums, row, rows, col);
    }
  }

  // The same, most of it in strips of AMX's tiles. The last begins where it is full, among rows that are done.
  void tall_block(const Activations<>& from, int64_t begin, int64_t end, int64_t col) const {
    alignas(64) int32_t sums[kStripRows * kBlock];
    alignas(64) int8_t rest[kTileLines * kBlock * kGroup];
    const int8_t* panel = w + col * k;
    const int64_t steps = ceil_div(k, kTileDepth), left = k % kTileDepth * kBlock;
    if (left) {
      std::copy_n(panel + (steps - 1) * sizeof rest, left, rest);
      std::fill(rest + left, std::end(rest), 0);
    }
    const int8_t* next = panel + kBlock * k;  // this thread's next block: a step reads kStripColumns lines of one
    const int64_t lines = ceil_div(kStripColumns, ceil_div(end - begin, kStripRows));
    int64_t row = begin;
    for (; end - row > kFewRows; row = std::min(row + kStripRows, end)) {
      const int64_t first = std::max(begin, std::min(row, end - kStripRows)), rows = std::min(kStripRows, end - row);
      prefetch(row, rows, col);
      for (int64_t c = 0; c < kBlock && col + c < n; c += kStripColumns, next += 64 * steps * lines)
        multiply_strip(from.data + (first - begin) * from.stride, from.stride, panel + c * kGroup,
                       left ? rest + c * kGroup : nullptr, steps, next, lines, sums + c);
      write<false>(sums + (row - first) * kBlock, row, rows, col);
    }
    if (row < end) block(from, begin, row, end, col);
  }

  void run() const {
    const int64_t columns = ceil_div(n, kBlock), row_bytes = k * int64_t(sizeof(Activation));
    const int64_t height = tall(m) ? kStripRows + kFewRows : kTileRows;  // at least: each block streams the weight
    const int64_t most = m / height, threads = at::get_num_threads();
    int64_t row_blocks = ceil_div(m * row_bytes, std::max(kRowBlockBytes, height * row_bytes));
    while (row_blocks * columns % threads && row_blocks < most) ++row_blocks;  // the same number of tasks for each
    at::parallel_for(0, row_blocks * columns, 1, [&](int64_t begin, int64_t end) {
      std::optional<Tiles> tiles;
      if (tall(m)) tiles.emplace();
      for (int64_t task = begin; task < end;) {
        const int64_t i = task / columns, last = std::min(end, (i + 1) * columns);
        const int64_t first_row = m * i / row_blocks, end_row = m * (i + 1) / row_blocks;
        const Activations<> from(x + first_row * k, end_row - first_row, k);
        for (; task < last; ++task) {
          const int64_t col = task % columns * kBlock;
          if (tall(end_row - first_row)) tall_block(from, first_row, end_row, col);
          else block(from, first_row, first_row, end_row, col);
        }
      }
    });
  }
};

// Memory for packed weights, laid side by side in chunks of huge pages: with one row, a linear does nothing but stream
// its weight, and up to a quarter of its time goes into page table walks. A chunk lives as long as a tensor in it.
Tensor empty_in_huge_pages(at::IntArrayRef shape, const at::TensorOptions& options) {
  constexpr int64_t kPage = 2 << 20, kChunk = 16 * kPage, kLine = 64;
  static std::mutex mutex;
  static std::shared_ptr<void> chunk;
  static char* chunk_end = nullptr;
  static int64_t left = 0;

  const std::lock_guard lock(mutex);
  const int64_t bytes = ceil_div(c10::multiply_integers(shape), kLine) * kLine;
  if (bytes > left) {
    left = std::max(kChunk, ceil_div(bytes, kPage) * kPage);
    void* memory = std::aligned_alloc(kPage, left);
    if (!memory) throw std::bad_alloc();
    madvise(memory, left, MADV_HUGEPAGE);  // advice only: without huge pages it works as well
    chunk = std::shared_ptr<void>(memory, std::free);
    chunk_end = static_cast<char*>(memory) + left;
  }
  char* data = chunk_end - left;
  left -= bytes;
  return at::from_blob(data, shape, [owner = chunk](void*) {}, options);
}

Tensor pack_weight(const Tensor& w_q) {
  TORCH_CHECK(w_q.dim() == 2, "pack_weight: w_q must be [N, K], got ", w_q.dim(), " dimensions");
  TORCH_CHECK(w_q.scalar_type() == at::kChar, "pack_weight: w_q must be int8, got ", w_q.scalar_type());
  const int64_t n = w_q.size(0), k = w_q.size(1);
  TORCH_CHECK(n > 0 && k > 0, "pack_weight: w_q must not be empty, got ", w_q.sizes());
  const Tensor w = w_q.contiguous();
  const int64_t groups = ceil_div(k, kGroup);
  Tensor packed = empty_in_huge_pages({ceil_div(n, kBlock), groups, kBlock, kGroup}, w.options());
  const int8_t* from = w.const_data_ptr<int8_t>();
  int8_t* to = packed.mutable_data_ptr<int8_t>();
  at::parallel_for(0, packed.size(0), 1, [&](int64_t begin, int64_t end) {
    std::memset(to + begin * groups * kBlock * kGroup, 0, (end - begin) * groups * kBlock * kGroup);
    for (int64_t row = begin * kBlock; row < std::min(end * kBlock, n); ++row) {
      int8_t* block = to + row / kBlock * groups * kBlock * kGroup + row % kBlock * kGroup;
      for (int64_t i = 0; i < k; ++i) block[i / kGroup * kBlock * kGroup + i % kGroup] = from[row * k + i];
    }
  });
  return packed;
}

// The operands of an INT8 linear, checked and laid out.
struct Operands {
  Tensor x, w, w_scale, colsum;
  std::optional<Tensor> x_scale, bias;
  std::vector<int64_t> shape;  // of the result

  Operands(const char* op, const Tensor& x_q, const std::optional<Tensor>& x_scale_, const Tensor& w_packed,
           const Tensor& w_scale_, const Tensor& w_colsum, const std::optional<Tensor>& bias_) {
    const auto check_dtype = [&](const char* name, const Tensor& t, at::ScalarType dtype) {
      TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", t.scalar_type());
    };
    check_dtype("x_q", x_q, at::kChar);
    check_dtype("w_packed", w_packed, at::kChar);
    check_dtype("w_scale", w_scale_, at::kFloat);
    check_dtype("w_colsum", w_colsum, at::kInt);
    TORCH_CHECK(x_q.dim() >= 1, op, ": x_q must be [..., K], got a scalar");
    const int64_t k = x_q.size(-1);
    TORCH_CHECK(k > 0, op, ": K must be at least 1, got x_q ", x_q.sizes());
    shape = x_q.sizes().vec();
    if (x_scale_) {
      check_dtype("x_scale", *x_scale_, at::kFloat);
      shape.back() = 1;
      TORCH_CHECK(x_scale_->sizes() == shape, op, ": x_scale must be ", at::IntArrayRef(shape), ", got ",
                  x_scale_->sizes());
      x_scale = x_scale_->contiguous();
    }
    TORCH_CHECK(w_scale_.dim() == 2 && w_scale_.size(0) > 0 && w_scale_.size(1) == 1, op,
                ": w_scale must be [N, 1], got ", w_scale_.sizes());
    const int64_t n = w_scale_.size(0);
    const int64_t packed_shape[] = {ceil_div(n, kBlock), ceil_div(k, kGroup), kBlock, kGroup};
    TORCH_CHECK(w_packed.sizes() == at::IntArrayRef(packed_shape), op, ": w_packed must be ",
                at::IntArrayRef(packed_shape), " (from pack_weight, for N=", n, ", K=", k, "), got ", w_packed.sizes());
    TORCH_CHECK(w_colsum.dim() == 1 && w_colsum.size(0) == n, op, ": w_colsum must be [", n, "], got ",
                w_colsum.sizes());
    if (bias_) {
      TORCH_CHECK(bias_->is_floating_point(), op, ": bias must be a float dtype, got ", bias_->scalar_type());
      TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == n, op, ": bias must be [", n, "], got ", bias_->sizes());
      bias = bias_->to(at::kFloat).contiguous();
    }
    shape.back() = n;
    const int64_t pad = packed_shape[1] * kGroup - k;  // meets the zeros of the packed weight
    x = (pad ? at::constant_pad_nd(x_q, {0, pad}) : x_q).contiguous();
    w = w_packed.contiguous();
    w_scale = w_scale_.contiguous();
    colsum = w_colsum.contiguous();
  }

  template <typename T, typename Finish>
  Tensor run(Finish finish) const {
    Tensor y = at::empty(shape, x.options().dtype(c10::CppTypeToScalarType<T>::value));
    const int64_t n = w_scale.size(0), k = x.size(-1);
    Linear<T, Finish>{x.const_data_ptr<int8_t>(), x_scale ? x_scale->const_data_ptr<float>() : nullptr,
                      w.const_data_ptr<int8_t>(), w_scale.const_data_ptr<float>(), colsum.const_data_ptr<int32_t>(),
                      bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<T>(), x.numel() / k, n, k,
                      finish}
        .run();
    return y;
  }
};

Tensor int8_linear(const Tensor& x_q, const std::optional<Tensor>& x_scale, const Tensor& w_packed, const Tensor& w_scale,
                   const Tensor& w_colsum, const std::optional<Tensor>& bias, at::ScalarType out_dtype) {
  const Operands operands("int8_linear", x_q, x_scale, w_packed, w_scale, w_colsum, bias);
  switch (out_dtype) {
    case at::kFloat: return operands.run<float>(Write<float>());
    case at::kBFloat16: return operands.run<at::BFloat16>(Write<at::BFloat16>());
    case at::kHalf: return operands.run<at::Half>(Write<at::Half>());
    case at::kChar: return operands.run<int8_t>(Write<int8_t>());
    default: TORCH_CHECK(false, "int8_linear: out_dtype must be Float, BFloat16, Half or Char, got ", out_dtype);
  }
}

Tensor int8_linear_gelu_quantize(const Tensor& x_q, const std::optional<Tensor>& x_scale, const Tensor& w_packed,
                                 const Tensor& w_scale, const Tensor& w_colsum, const std::optional<Tensor>& bias,
                                 at::ScalarType dtype, std::string_view approximate, const Tensor& out_scale) {
  constexpr const char* op = "int8_linear_gelu_quantize";
  const Operands operands(op, x_q, x_scale, w_packed, w_scale, w_colsum, bias);
  const int64_t n = w_scale.size(0);
  TORCH_CHECK(out_scale.scalar_type() == at::kFloat, op, ": out_scale must be Float, got ", out_scale.scalar_type());
  TORCH_CHECK(out_scale.numel() == n || out_scale.numel() == 1, op, ": out_scale must have ", n, " elements, got ",
              out_scale.sizes());
  const Tensor steps = out_scale.reshape({-1}).expand({n}).contiguous();
  const Gelu& gelu = gelu_form(op, approximate);
  const float* step = steps.const_data_ptr<float>();
  switch (dtype) {
    case at::kFloat: return operands.run<int8_t>(WriteGelu<float>{gelu, step});
    case at::kBFloat16: return operands.run<int8_t>(WriteGelu<at::BFloat16>{gelu, step});
    case at::kHalf: return operands.run<int8_t>(WriteGelu<at::Half>{gelu, step});
    default: TORCH_CHECK(false, op, ": dtype must be Float, BFloat16 or Half, got ", dtype);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("pack_weight(Tensor w_q) -> Tensor");
  m.def(
      "int8_linear(Tensor x_q, Tensor? x_scale, Tensor w_packed, Tensor w_scale, Tensor w_colsum, Tensor? bias, "
      "ScalarType out_dtype) -> Tensor");
  m.def(
      "int8_linear_gelu_quantize(Tensor x_q, Tensor? x_scale, Tensor w_packed, Tensor w_scale, Tensor w_colsum, "
      "Tensor? bias, ScalarType dtype, str approximate, Tensor out_scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("int8_linear", &int8_linear);
  m.impl("int8_linear_gelu_quantize", &int8_linear_gelu_quantize);
}
