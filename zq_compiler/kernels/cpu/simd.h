// Sixteen lanes of 32 bits, in which all kernels are written: one register of AVX512, or two of AVX2. Both bodies round,
// reduce and treat NaN alike, so that results do not depend on the machine.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace zq {

constexpr int64_t kLanes = 16;

#ifdef __AVX512F__

struct Floats {
  __m512 v;
  Floats() = default;
  Floats(__m512 v) : v(v) {}
  Floats(float x) : v(_mm512_set1_ps(x)) {}
};

struct Ints {
  __m512i v;
  Ints() = default;
  Ints(__m512i v) : v(v) {}
  Ints(int32_t x) : v(_mm512_set1_epi32(x)) {}
};

using Mask = __mmask16;   // any lanes
using Lanes = __mmask16;  // the first few
constexpr Lanes kAll = 0xFFFF;

inline Lanes first_lanes(int64_t count) {
  return count >= kLanes ? kAll : count <= 0 ? Lanes(0) : Lanes((1u << count) - 1);
}

inline Floats operator+(Floats a, Floats b) { return _mm512_add_ps(a.v, b.v); }
inline Floats operator-(Floats a, Floats b) { return _mm512_sub_ps(a.v, b.v); }
inline Floats operator*(Floats a, Floats b) { return _mm512_mul_ps(a.v, b.v); }
inline Floats operator/(Floats a, Floats b) { return _mm512_div_ps(a.v, b.v); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // c + a * b
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a.v, b.v); }  // b where either is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a.v, b.v); }
inline Floats abs(Floats a) { return _mm512_abs_ps(a.v); }
inline Floats round(Floats a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats past_round(Floats a) { return _mm512_reduce_ps(a.v, _MM_FROUND_TO_NEAREST_INT); }  // a - round(a)
inline Floats scale(Floats p, Floats n) { return _mm512_scalef_ps(p.v, n.v); }  // p * 2^n, rounded once
inline Floats scale_normal(Floats p, Floats n) { return scale(p, n); }          // the same for n in [-126, 127]

inline Ints operator+(Ints a, Ints b) { return _mm512_add_epi32(a.v, b.v); }
inline Ints operator-(Ints a, Ints b) { return _mm512_sub_epi32(a.v, b.v); }
inline Ints operator&(Ints a, Ints b) { return _mm512_and_si512(a.v, b.v); }
inline Ints operator<<(Ints a, int bits) { return _mm512_slli_epi32(a.v, bits); }
inline Ints operator>>(Ints a, int bits) { return _mm512_srli_epi32(a.v, bits); }
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a.v, b.v); }

inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a.v); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a.v); }
inline Ints bits_of(Floats a) { return _mm512_castps_si512(a.v); }
inline Floats of_bits(Ints a) { return _mm512_castsi512_ps(a.v); }

inline Mask operator<(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask operator>(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline bool any(Mask m) { return m; }
inline Floats select(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b.v, m, a.v); }  // m ? a : b
inline Ints select(Mask m, Ints a, Ints b) { return _mm512_mask_mov_epi32(b.v, m, a.v); }
inline Floats keep(Lanes lanes, Floats a) { return _mm512_maskz_mov_ps(lanes, a.v); }  // zeros in the others

inline float reduce_add(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline int32_t reduce_max(Ints a) { return _mm512_reduce_max_epi32(a.v); }

inline Floats lookup(const float* table, Ints index) {  // 16 entries; by the lowest 4 bits
  return _mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table));
}

template <int kApart>  // 1, 2, 4 or 8: each lane gets the one so far from it
Floats partners(Floats a) {
  if constexpr (kApart == 1) return _mm512_permute_ps(a.v, 0xB1);
  else if constexpr (kApart == 2) return _mm512_permute_ps(a.v, 0x4E);
  else if constexpr (kApart == 4) return _mm512_shuffle_f32x4(a.v, a.v, 0xB1);
  else return _mm512_shuffle_f32x4(a.v, a.v, 0x4E);
}

template <int kApart>  // 1 in the first of two partners, -1 in the second
Floats signs() {
  constexpr Mask second = kApart == 1 ? 0xAAAA : kApart == 2 ? 0xCCCC : kApart == 4 ? 0xF0F0 : 0xFF00;
  return _mm512_mask_blend_ps(second, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

// Loads read the given lanes only, and give zeros in the others; stores write those only.
inline __m128i load_bytes(const int8_t* x, Lanes lanes) { return _mm_maskz_loadu_epi8(lanes, x); }
inline Floats load(const float* x, Lanes lanes = kAll) { return _mm512_maskz_loadu_ps(lanes, x); }
inline Floats load(const at::Half* x, Lanes lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, x)); }
inline Floats load(const at::BFloat16* x, Lanes lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16));
}
inline Floats load(const int8_t* x, Lanes lanes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, x)));
}
inline Ints load(const int32_t* x, Lanes lanes = kAll) { return _mm512_maskz_loadu_epi32(lanes, x); }
inline Mask load(const bool* x, Lanes lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, x);
  return _mm_test_epi8_mask(bytes, bytes);
}

inline __m256i to_half(Floats a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats of_half(__m256i a) { return _mm512_cvtph_ps(a); }

inline void store(float* y, Lanes lanes, Floats a) { _mm512_mask_storeu_ps(y, lanes, a.v); }
inline void store(float* y, Floats a) { _mm512_storeu_ps(y, a.v); }
inline void store(int32_t* y, Ints a) { _mm512_storeu_si512(y, a.v); }
inline void store_half(void* y, Lanes lanes, __m256i a) { _mm256_mask_storeu_epi16(y, lanes, a); }
inline void store_low16(void* y, Lanes lanes, Ints a) { store_half(y, lanes, _mm512_cvtepi32_epi16(a.v)); }
inline void store_low8(int8_t* y, Lanes lanes, Ints a) { _mm_mask_storeu_epi8(y, lanes, _mm512_cvtepi32_epi8(a.v)); }

#else  // AVX2, FMA and F16C

struct Floats {
  __m256 low, high;
  Floats() = default;
  Floats(__m256 low, __m256 high) : low(low), high(high) {}
  Floats(float x) : low(_mm256_set1_ps(x)), high(low) {}
};

struct Ints {
  __m256i low, high;
  Ints() = default;
  Ints(__m256i low, __m256i high) : low(low), high(high) {}
  Ints(int32_t x) : low(_mm256_set1_epi32(x)), high(low) {}
};

struct Mask {  // any lanes: all bits of them are set
  __m256 low, high;
};

struct Lanes {  // the first few
  int64_t count;

  bool all() const { return count >= kLanes; }
  operator Mask() const {
    const __m256i n = _mm256_set1_epi32(int32_t(count)), step = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(n, step);
    const __m256i high = _mm256_cmpgt_epi32(n, _mm256_add_epi32(step, _mm256_set1_epi32(8)));
    return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
  }
};
constexpr Lanes kAll{kLanes};

inline Lanes first_lanes(int64_t count) {
  return {count >= kLanes ? kLanes : count <= 0 ? 0 : count};
}

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fmadd(Floats a, Floats b, Floats c) {  // c + a * b
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnmadd(Floats a, Floats b, Floats c) {  // c - a * b
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats min(Floats a, Floats b) {  // b where either is NaN
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Floats round(Floats a) {
  constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, kEven), _mm256_round_ps(a.high, kEven)};
}
inline Floats past_round(Floats a) { return a - round(a); }

inline Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Ints operator<<(Ints a, int bits) { return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)}; }
inline Ints operator>>(Ints a, int bits) { return {_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)}; }
inline Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }

inline Ints to_ints(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Ints bits_of(Floats a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline Floats of_bits(Ints a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }

// p * 2^n, rounded once, for n in [-126, 127]; and for p near 1 and any |n| up to 250, in two factors.
inline Floats scale_normal(Floats p, Floats n) { return p * of_bits((to_ints(n) + Ints(127)) << 23); }
inline Floats scale(Floats p, Floats n) {
  const Floats half = round(n * 0.5f);
  return scale_normal(scale_normal(p, half), n - half);
}

inline Mask operator<(Floats a, Floats b) {
  return {_mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ)};
}
inline Mask operator>(Floats a, Floats b) { return b < a; }
inline Mask is_nan(Floats a) {
  return {_mm256_cmp_ps(a.low, a.low, _CMP_UNORD_Q), _mm256_cmp_ps(a.high, a.high, _CMP_UNORD_Q)};
}
inline bool any(Mask m) { return _mm256_movemask_ps(_mm256_or_ps(m.low, m.high)); }
inline Floats select(Mask m, Floats a, Floats b) {  // m ? a : b
  return {_mm256_blendv_ps(b.low, a.low, m.low), _mm256_blendv_ps(b.high, a.high, m.high)};
}
inline Ints select(Mask m, Ints a, Ints b) { return bits_of(select(m, of_bits(a), of_bits(b))); }
inline Floats keep(Lanes lanes, Floats a) { return lanes.all() ? a : select(lanes, a, 0.0f); }  // zeros in the others

template <int kApart>  // 1, 2, 4 or 8: each lane gets the one so far from it
Floats partners(Floats a) {
  if constexpr (kApart == 1) return {_mm256_permute_ps(a.low, 0xB1), _mm256_permute_ps(a.high, 0xB1)};
  else if constexpr (kApart == 2) return {_mm256_permute_ps(a.low, 0x4E), _mm256_permute_ps(a.high, 0x4E)};
  else if constexpr (kApart == 4)
    return {_mm256_permute2f128_ps(a.low, a.low, 1), _mm256_permute2f128_ps(a.high, a.high, 1)};
  else return {a.high, a.low};
}

template <int kApart>  // 1 in the first of two partners, -1 in the second
Floats signs() {
  const auto sign = [](int lane) { return lane & kApart ? -1.0f : 1.0f; };
  const auto half = [&](int i) {
    return _mm256_setr_ps(sign(i), sign(i + 1), sign(i + 2), sign(i + 3), sign(i + 4), sign(i + 5), sign(i + 6),
                          sign(i + 7));
  };
  return {half(0), half(8)};
}

// All lanes into the first, in the order of _mm512_reduce_add_ps.
template <typename F>
float reduce(Floats a, F f) {
  a = f(partners<8>(a), a);
  a = f(partners<4>(a), a);
  a = f(a, partners<2>(a));
  return _mm256_cvtss_f32(f(a, partners<1>(a)).low);
}
inline float reduce_add(Floats a) {
  return reduce(a, [](Floats x, Floats y) { return x + y; });
}
inline float reduce_max(Floats a) {
  return reduce(a, [](Floats x, Floats y) { return max(x, y); });
}
inline int32_t reduce_max(Ints a) {
  const auto larger = [](Floats x, Floats y) { return of_bits(max(bits_of(x), bits_of(y))); };
  return std::bit_cast<int32_t>(reduce(of_bits(a), larger));
}

inline Floats lookup(const float* table, Ints index) {  // 16 entries; by the lowest 4 bits
  const auto half = [first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8)](__m256i i) {
    const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // where a blend looks
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, i), _mm256_permutevar8x32_ps(second, i), fourth_bit);
  };
  return {half(index.low), half(index.high)};
}

inline __m128i load_bytes(const int8_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
inline __m256i load_half(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline Floats of_half(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
inline Floats load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline Floats load(const at::Half* x) { return of_half(load_half(x)); }
inline Floats load(const at::BFloat16* x) {
  const __m256i a = load_half(x);
  return of_bits(Ints(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                      _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))) << 16);
}
inline Floats load(const int8_t* x) {
  const __m128i a = load_bytes(x);
  return to_floats({_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(a, a))});
}
inline Ints load(const int32_t* x) { return {load_half(x), load_half(x + 8)}; }
inline Mask load(const bool* x) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), zero = _mm_setzero_si128();
  const __m128i none = _mm_cmpeq_epi8(a, zero);  // -1 where false
  const auto half = [](__m128i bytes) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_cvtepi8_epi32(bytes), _mm256_setzero_si256()));
  };
  return {half(none), half(_mm_unpackhi_epi64(none, none))};
}

// Loads read the given lanes only, and give zeros in the others; stores write those only. AVX2 has no masks for bytes:
// the last vector of a row goes through memory, out of line, so that all others stay small.
template <typename T>
[[gnu::noinline]] auto load_part(const T* x, int64_t count) {
  T part[kLanes] = {};
  std::memcpy(part, x, count * sizeof(T));
  return load(part);
}
template <typename V>
[[gnu::noinline]] void store_part(void* y, V a, int64_t bytes) {
  std::memcpy(y, &a, bytes);
}

template <typename T>
auto load(const T* x, Lanes lanes) {
  return lanes.all() ? load(x) : load_part(x, lanes.count);
}
inline __m128i load_bytes(const int8_t* x, Lanes lanes) {
  if (lanes.all()) return load_bytes(x);
  __m128i part = _mm_setzero_si128();
  std::memcpy(&part, x, lanes.count);
  return part;
}

inline __m256i to_half(Floats a) {
  constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(a.high, kEven), _mm256_cvtps_ph(a.low, kEven));
}

inline void store(float* y, Floats a) {
  _mm256_storeu_ps(y, a.low);
  _mm256_storeu_ps(y + 8, a.high);
}
inline void store(int32_t* y, Ints a) { store(reinterpret_cast<float*>(y), of_bits(a)); }
inline void store(float* y, Lanes lanes, Floats a) {
  if (lanes.all()) store(y, a);
  else store_part(y, a, lanes.count * 4);
}
inline void store_half(void* y, Lanes lanes, __m256i a) {
  if (lanes.all()) _mm256_storeu_si256(static_cast<__m256i*>(y), a);
  else store_part(y, a, lanes.count * 2);
}
// The packs work in 128-bit lanes, hence the permutations.
inline void store_low16(void* y, Lanes lanes, Ints a) {  // of numbers in [0, 2^16)
  store_half(y, lanes, _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xD8));
}
inline void store_low8(int8_t* y, Lanes lanes, Ints a) {  // of numbers in [-128, 127]
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.low, a.high), 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (lanes.all()) _mm_storeu_si128(reinterpret_cast<__m128i*>(y), bytes);
  else store_part(y, bytes, lanes.count);
}

#endif

// Sixteen lanes of 16 bits, one register on both.
struct Words {
  __m256i v;
  Words() = default;
  Words(__m256i v) : v(v) {}
  Words(int16_t x) : v(_mm256_set1_epi16(x)) {}
};

inline Words operator&(Words a, Words b) { return _mm256_and_si256(a.v, b.v); }
inline Words operator|(Words a, Words b) { return _mm256_or_si256(a.v, b.v); }
inline Words operator<<(Words a, int bits) { return _mm256_slli_epi16(a.v, bits); }
inline Words operator>>(Words a, int bits) { return _mm256_srli_epi16(a.v, bits); }
inline Words shift_signed(Words a, int bits) { return _mm256_srai_epi16(a.v, bits); }
inline Words load(const int16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline Floats of_half(Words a) { return of_half(a.v); }
// The signed numbers in the highest bits: of the lower words of each 32 bits, then of the higher ones.
template <int kBits>
Floats to_floats(Words a) {
#ifdef __AVX512F__
  const __m512i low_first = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_slli_epi32(a.v, 16)), a.v, 1);
  return to_floats(Ints(_mm512_srai_epi32(low_first, 32 - kBits)));
#else
  return to_floats(Ints(_mm256_srai_epi32(_mm256_slli_epi32(a.v, 16), 32 - kBits), _mm256_srai_epi32(a.v, 32 - kBits)));
#endif
}

// Not vcvtneps2bf16: it flushes denormals.
inline Ints to_bfloat16(Floats a) {
  const Ints bits = bits_of(a), odd = (bits >> 16) & Ints(1);
  return select(is_nan(a), Ints(0x7FC0), (bits + Ints(0x7FFF) + odd) >> 16);
}

inline void store(at::Half* y, Lanes lanes, Floats a) { store_half(y, lanes, to_half(a)); }
inline void store(at::BFloat16* y, Lanes lanes, Floats a) { store_low16(y, lanes, to_bfloat16(a)); }

// Rounded half to even, saturated; NaN gives 0.
inline void store(int8_t* y, Lanes lanes, Floats a) {
  a = select(is_nan(a), 0.0f, a);
  store_low8(y, lanes, to_ints(min(max(a, -128.0f), 127.0f)));
}

// a rounded to T, as floats: what an op of that dtype hands to the next.
template <typename T>
Floats rounded(Floats a) {
  if constexpr (std::is_same_v<T, at::Half>) return of_half(to_half(a));
  if constexpr (std::is_same_v<T, at::BFloat16>) return of_bits(to_bfloat16(a) << 16);
  return a;
}

// f(offset, lanes) for each vector of a row of k values.
template <typename F>
void for_each_vector(int64_t k, F f) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) f(i, kAll);
  if (i < k) f(i, first_lanes(k - i));
}

}  // namespace zq
