// INT8 attention: int32 scores, softmax in float32, 8-bit probabilities, their product with the values.
//
// Keys and values are packed once a head. Then a task takes a tile of query rows all the way: its scores for all keys
// stay in the L2 cache, where they become floats and then bytes in place. Nothing is rescaled as in flash attention,
// because the integers must be those of the whole row's softmax.

#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <utility>

#include "int8_product.h"

namespace {

using namespace zq;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- softmax, each step in place over a row --------------------------------------------------------------------------

// e^x for x <= 0, within 2e-7 of it (4e-7 below -20): 2^n * e^r with |r| <= ln(2) / 2, and e^r by the polynomial
// 1 + r * (...) of least relative error. Exactly 1 at 0; 1e-38 for all below -87, -Inf too; NaN for NaN.
Floats exp(Floats x) {
  constexpr float kTerms[] = {0x1.573ad0p-5f, 0x1.555a6ep-3f, 0x1.fffdc4p-2f, 0x1.fffff6p-1f, 1.0f};
  const Floats magic = 0x1.8p23f;  // adding it rounds to an integer
  x = max(-87.0f, x);              // in this order max keeps a NaN
  const Floats n = fmadd(x, 0x1.715476p0f, magic) - magic;
  const Floats r = fnmadd(n, 0x1.62e430p-1f, x);
  Floats p = 0x1.0fa7d8p-7f;
  for (const float c : kTerms) p = fmadd(p, r, c);
  return scale_normal(p, n);
}

// int32 sums become scores, A = masked(i, lanes, sum * scale), and -Inf from `keys` to `padded`; returns the largest.
template <typename F>
float score(int32_t* sums, int64_t keys, int64_t padded, float scale, F masked) {
  const Floats none = -kInfinity;
  auto* row = reinterpret_cast<float*>(sums);
  Floats top = none;
  for_each_vector(keys, [&](int64_t i, Lanes lanes) {
    const Floats a = select(lanes, masked(i, lanes, to_floats(load(sums + i)) * scale), none);
    top = max(top, a);
    store(row + i, a);
  });
  for (int64_t i = round_up(keys, kLanes); i < padded; i += kLanes) store(row + i, none);
  return reduce_max(top);
}

// Scores become E = e^(A - top); returns their sum.
float exponentiate(float* row, int64_t padded, float top) {
  Floats sum = 0.0f;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Floats e = exp(load(row + i) - top);
    sum = sum + e;
    store(row + i, e);
  }
  return reduce_add(sum);
}

// E becomes the integers round(E * levels), at most `largest`.
void quantize(float* row, int64_t padded, float levels, float largest) {
  auto* q = reinterpret_cast<Unsigned*>(row);
  for (int64_t i = 0; i < padded; i += kBlock) {
    Ints block[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) block[v] = to_ints(min(load(row + i + v * kLanes) * levels, largest));
    store(q + i, block);
  }
}

// --- the operator ----------------------------------------------------------------------------------------------------

// The heads of a tensor [B, H, T, K] whose rows have unit stride; no data where there is no tensor.
template <typename T>
struct Heads {
  const T* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, stride = 0;

  Heads() = default;
  explicit Heads(const Tensor& x)
      : data(x.const_data_ptr<T>()), batch_stride(x.stride(0)), head_stride(x.stride(1)), stride(x.stride(2)) {}
  const T* row(int64_t b, int64_t h, int64_t t) const {
    return data + b * batch_stride + h * head_stride + t * stride;
  }
};

struct alignas(64) Line {
  int32_t lanes[kLanes];
};

struct Row {
  int64_t batch, head, token, keys;  // keys: how many it sees, at the front
  float top, sum, factor;            // of its scores, of its exponentials, of its output
};

template <typename T>
struct Attention {
  int64_t b, h, h_kv, t, s, d;
  bool causal;
  float largest;  // integer of a probability
  Heads<int8_t> query, key, value;
  Heads<bool> allowed;  // at most one of the two masks
  Heads<float> added;
  const float* score_scale;        // [h]
  const float* probability_scale;  // [h] or null
  const float* out_scale;          // [h, d]
  int8_t* packed;                  // for each head: keys, their starts, values
  T* out;                          // [b, t, h, d]

  Layout key_layout{s, d}, value_layout{d, s};

  int64_t head_bytes() const { return key_layout.bytes() + key_layout.n * 4 + value_layout.bytes(); }
  int8_t* keys_of(int64_t head) const { return packed + head * head_bytes(); }
  int32_t* starts_of(int64_t head) const { return reinterpret_cast<int32_t*>(keys_of(head) + key_layout.bytes()); }
  int8_t* values_of(int64_t head) const { return reinterpret_cast<int8_t*>(starts_of(head) + key_layout.n); }

  float score_row(const Row& row, int32_t* sums, int64_t padded) const {
    const auto with = [&](auto masked) { return score(sums, row.keys, padded, score_scale[row.head], masked); };
    if (allowed.data) {
      const bool* from = allowed.row(row.batch, row.head, row.token);
      return with([from](int64_t i, Lanes lanes, Floats v) { return select(load(from + i, lanes), v, -kInfinity); });
    }
    if (added.data) {
      const float* from = added.row(row.batch, row.head, row.token);
      return with([from](int64_t i, Lanes lanes, Floats v) { return v + load(from + i, lanes); });
    }
    return with([](int64_t, Lanes, Floats v) { return v; });
  }

  // Rows [first, first + count) of the queries that read one head of keys, ordered by head, then token.
  void tile(int64_t head, int64_t first, int64_t count) const {
    const int64_t stride = round_up(s, kBlock) + kLanes;  // never a power of two: rows would share sets of the cache
    const int64_t q_stride = round_up(d, 64), sums_stride = value_layout.n;
    thread_local std::vector<Line> memory;
    const int64_t q_lines = ceil_div(q_stride * int64_t(sizeof(Unsigned)), int64_t(sizeof(Line)));
    const int64_t lines = kTileRows * ((stride + sums_stride) / kLanes + q_lines);
    if (int64_t(memory.size()) < lines) memory.resize(lines);
    int32_t* scores = memory.data()->lanes;
    int32_t* sums = scores + kTileRows * stride;
    auto* q = reinterpret_cast<Unsigned*>(sums + kTileRows * sums_stride);
    const auto floats = [&](int64_t r) { return reinterpret_cast<float*>(scores + r * stride); };

    Row rows[kTileRows];
    int64_t most = 0;
    for (int64_t r = 0; r < count; ++r) {
      Row& row = rows[r];
      row.batch = head / h_kv;
      row.head = head % h_kv * (h / h_kv) + (first + r) / t;
      row.token = (first + r) % t;
      row.keys = causal ? std::min(s, row.token + 1) : s;
      most = std::max(most, row.keys);
      const int8_t* from = query.row(row.batch, row.head, row.token);
      for (int64_t c = 0; c < d; c += 64) __builtin_prefetch(from + kTileRows * query.stride + c);
      make_unsigned(from, d, q + r * q_stride);
    }
    multiply_rows(count, q, q_stride, key_layout, keys_of(head), most, key_layout.groups, starts_of(head), scores,
                  stride);

    // Step by step for all rows, so that the reductions of one hide behind the work on the next.
    const int64_t padded = round_up(most, kBlock);
    for (int64_t r = 0; r < count; ++r) {
      const float top = score_row(rows[r], scores + r * stride, padded);
      rows[r].top = top == -kInfinity ? 0.0f : top;  // a row wholly masked: no E, and zeros in the end
    }
    for (int64_t r = 0; r < count; ++r)
      rows[r].sum = std::max(exponentiate(floats(r), padded, rows[r].top), 1.0f);  // in this order max keeps a NaN
    for (int64_t r = 0; r < count; ++r) {
      const float sum = rows[r].sum;
      const float levels = probability_scale ? 1.0f / (sum * probability_scale[rows[r].head]) : 255.0f;
      quantize(floats(r), padded, levels, largest);
      rows[r].factor = probability_scale ? 1.0f + (sum - sum) : 1.0f / (255.0f * sum);  // NaN for a NaN sum
    }
    multiply_rows(count, reinterpret_cast<Unsigned*>(scores), stride * 4 / int64_t(sizeof(Unsigned)), value_layout,
                  values_of(head), value_layout.n, ceil_div(most, kGroup), nullptr, sums, sums_stride);

    for (int64_t r = 0; r < count; ++r) {
      T* y = out + ((rows[r].batch * t + rows[r].token) * h + rows[r].head) * d;
      const float* scale = out_scale + rows[r].head * d;
      const float factor = rows[r].factor;
      for_each_vector(d, [&](int64_t c, Lanes lanes) {
        const Floats sum = to_floats(load(sums + r * sums_stride + c));
        store(y + c, lanes, sum * load(scale + c, lanes) * factor);
      });
    }
  }

  void run() const {
    at::parallel_for(0, b * h_kv, std::max<int64_t>(1, kGrain / (s * d + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t i = head / h_kv, j = head % h_kv;
        pack_rows(key.row(i, j, 0), key.stride, s, d, key_layout, keys_of(head), starts_of(head));
        pack_columns(value.row(i, j, 0), value.stride, s, d, value_layout, values_of(head));
      }
    });
    const int64_t rows = h / h_kv * t, tiles = ceil_div(rows, kTileRows);
    const int64_t grain = std::max<int64_t>(1, kGrain / (kTileRows * (s + d)));
    at::parallel_for(0, b * h_kv * tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        // From both ends in turn: under a causal mask the last tiles are the heavy ones, and threads share alike.
        const int64_t turn = task % tiles, i = turn % 2 ? tiles - 1 - turn / 2 : turn / 2, first = rows * i / tiles;
        tile(task / tiles, first, rows * (i + 1) / tiles - first);
      }
    });
  }
};

Tensor unit_stride(const Tensor& x) {
  return x.stride(3) == 1 ? x : x.contiguous();
}

Tensor broadcast(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(at::is_expandable_to(x.sizes(), shape), "int8_attention: ", name, " must broadcast to ", shape, ", got ",
              x.sizes());
  return x.expand(shape);
}

Tensor scales(const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK(x.scalar_type() == at::kFloat, "int8_attention: ", name, " must be Float, got ", x.scalar_type());
  return broadcast(name, x, shape).contiguous();
}

Tensor int8_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& score_scale,
                      const std::optional<Tensor>& mask, bool is_causal,
                      const std::optional<Tensor>& probability_scale, const Tensor& out_scale,
                      at::ScalarType out_dtype, bool signed_probabilities) {
  for (const auto& [name, x] : {std::pair("query", query), std::pair("key", key), std::pair("value", value)}) {
    TORCH_CHECK(x.scalar_type() == at::kChar, "int8_attention: ", name, " must be Char, got ", x.scalar_type());
    TORCH_CHECK(x.dim() == 4, "int8_attention: ", name, " must be [B, H, T, D], got ", x.sizes());
  }
  const int64_t b = query.size(0), h = query.size(1), t = query.size(2), d = query.size(3);
  const int64_t h_kv = key.size(1), s = key.size(2);
  TORCH_CHECK(key.size(0) == b && key.size(3) == d && h_kv > 0 && h % h_kv == 0,
              "int8_attention: key must be [B, Hkv, S, D] with Hkv a divisor of H, got ", key.sizes(), " for query ",
              query.sizes());
  TORCH_CHECK(value.sizes() == key.sizes(), "int8_attention: value must be ", key.sizes(), ", got ", value.sizes());
  TORCH_CHECK(std::max(s, d) <= kMaxSummed, "int8_attention: S and D must be at most ", kMaxSummed, ", got ", s,
              " and ", d);
  const Tensor score_scales = scales("score_scale", score_scale, {1, h, 1, 1});
  const Tensor out_scales = scales("out_scale", out_scale, {1, h, 1, d});
  std::optional<Tensor> probability_scales, allowed, added;
  if (probability_scale) probability_scales = scales("probability_scale", *probability_scale, {1, h, 1, 1});
  if (mask && mask->scalar_type() == at::kBool) {
    allowed = unit_stride(broadcast("mask", *mask, {b, h, t, s}));
  } else if (mask) {
    TORCH_CHECK(mask->is_floating_point(), "int8_attention: mask must be Bool or a float dtype, got ",
                mask->scalar_type());
    added = unit_stride(broadcast("mask", mask->to(at::kFloat), {b, h, t, s}));
  }

  const Tensor out = at::empty({b, t, h, d}, query.options().dtype(out_dtype));
  const auto call = [&](auto type) {
    if (out.numel() == 0) return;
    using T = decltype(type);
    const Tensor q = unit_stride(query), k = unit_stride(key), v = unit_stride(value);
    const float largest = probability_scale && signed_probabilities ? 127.0f : 255.0f;
    Attention<T> attention{b, h, h_kv, t, s, d, is_causal, largest, Heads<int8_t>(q), Heads<int8_t>(k), Heads<int8_t>(v)};
    if (allowed) attention.allowed = Heads<bool>(*allowed);
    if (added) attention.added = Heads<float>(*added);
    attention.score_scale = score_scales.const_data_ptr<float>();
    if (probability_scales) attention.probability_scale = probability_scales->const_data_ptr<float>();
    attention.out_scale = out_scales.const_data_ptr<float>();
    const Tensor packed = at::empty({b * h_kv * attention.head_bytes()}, query.options());
    attention.packed = packed.mutable_data_ptr<int8_t>();
    attention.out = out.mutable_data_ptr<T>();
    attention.run();
  };
  switch (out_dtype) {
    case at::kChar: call(int8_t()); break;
    case at::kFloat: call(float()); break;
    case at::kBFloat16: call(at::BFloat16()); break;
    case at::kHalf: call(at::Half()); break;
    default: TORCH_CHECK(false, "int8_attention: out_dtype must be Char, Float, BFloat16 or Half, got ", out_dtype);
  }
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def(
      "int8_attention(Tensor query, Tensor key, Tensor value, Tensor score_scale, Tensor? mask, bool is_causal, "
      "Tensor? probability_scale, Tensor out_scale, ScalarType out_dtype, bool signed_probabilities=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("int8_attention", &int8_attention);
}
