// Vectors of float32 as wide as the target's registers, and what the kernels do with them.
//
// The same sources are compiled once for each instruction set; SKYLINE_AMX, AVX-512 or AVX2 is known to the preprocessor.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace skyline {

using bf16 = uint16_t;  // storage only: the upper half of a float32

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even; a NaN stays one.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<bf16>((bits >> 16) | 0x40);
  return static_cast<bf16>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  return to_bf16(value);
}

// Ask for a cache line in the first- or second-level cache. Not the intrinsic: GCC takes functions that do nothing else for
// pure ones and drops their calls.
inline void prefetch_l1(const void* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p))); }
inline void prefetch_l2(const void* p) { __asm__ volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p))); }

// The same, and so that it can be written at once.
inline void prefetch_to_write(const void* p) { __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p))); }

// Four bytes in all places of a vector: one instruction, which only loads.
#if defined(__AVX512F__)
inline __m512i spread_four(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}
#else
inline __m256i spread_four(const void* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm256_set1_epi32(bits);
}
#endif

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
  }
  static Vec load(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  // The first n elements; the others are zero.
  static Vec load(const float* p, int n) { return whole(n) ? load(p) : Vec{_mm512_maskz_loadu_ps(mask(n), p)}; }
  static Vec load(const bf16* p, int n) {
    if (whole(n)) return load(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask(n), p)), 16))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded()); }
  void store(float* p, int n) const { whole(n) ? store(p) : _mm512_mask_storeu_ps(p, mask(n), v); }
  void store(bf16* p, int n) const { whole(n) ? store(p) : _mm256_mask_storeu_epi16(p, mask(n), rounded()); }
  // Rounded to nearest even, saturated.
  void store(int8_t* p, int n) const {
    const __m512i whole_numbers = _mm512_cvtps_epi32(v);
    if (!whole(n)) return _mm512_mask_cvtsepi32_storeu_epi8(p, mask(n), whole_numbers);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(whole_numbers));
  }
  // The same with 128 added.
  void store(uint8_t* p, int n) const {
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(128));
    _mm512_mask_cvtusepi32_storeu_epi8(p, mask(n), _mm512_max_epi32(whole, _mm512_setzero_si512()));
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }

 private:
  static bool whole(int n) { return __builtin_constant_p(n) && n >= 16; }
  static __mmask16 mask(int n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1); }
  // By integer arithmetic, as on AVX2: the instruction for it would flush denormal numbers.
  __m256i rounded() const {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(up);
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n in [-127, 128], by making the exponent; n = -127 gives 0.
inline Vec exp2_whole(Vec n) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const int32_t* p) { return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
  static Vec load(const bf16* p, int n) {
    if (n >= width) return load(p);
    alignas(16) bf16 part[8] = {};
    std::memcpy(part, p, 2 * n);
    return load(part);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded()); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  void store(bf16* p, int n) const {
    if (n >= width) return store(p);
    alignas(16) bf16 part[8];
    store(part);
    std::memcpy(p, part, 2 * n);
  }
  // Rounded to nearest even, saturated.
  void store(int8_t* p, int n) const {
    __m256i whole = _mm256_cvtps_epi32(v);
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    alignas(16) int8_t part[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm_packs_epi16(half, half));
    std::memcpy(p, part, n < width ? n : width);
  }
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float max() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec widen(__m128i half) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))}; }
  __m128i rounded() const {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    up = _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec round_even(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec exp2_whole(Vec n) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}

#else
#error "compile with at least AVX2 and FMA"
#endif

// e^x for x <= 88, within 2 units in the last place; results below the smallest normal number are 0, and e^NaN is NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; the polynomial is the Taylor series of e^r to the 7th power.
inline Vec exp(Vec x) {
  Vec clamped = max(Vec::all(-88.0f), min(x, Vec::all(88.0f)));  // of a NaN, max and min return the second operand
  Vec n = round_even(clamped * Vec::all(1.44269504088896341f));
  Vec r = fma(n, Vec::all(-0.693359375f), clamped);  // ln 2 in two parts, of which the first is exact in products with n
  r = fma(n, Vec::all(2.12194440e-4f), r);
  Vec p = Vec::all(1.0f / 5040);
  p = fma(p, r, Vec::all(1.0f / 720));
  p = fma(p, r, Vec::all(1.0f / 120));
  p = fma(p, r, Vec::all(1.0f / 24));
  p = fma(p, r, Vec::all(1.0f / 6));
  p = fma(p, r, Vec::all(0.5f));
  p = fma(p, r, Vec::all(1.0f));
  p = fma(p, r, Vec::all(1.0f));
  Vec result = p * exp2_whole(n);
#if defined(__AVX512F__)
  result.v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-88.0f), _CMP_NLT_UQ), result.v);
  result.v = _mm512_mask_mov_ps(result.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v);
#else
  result.v = _mm256_and_ps(result.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(-88.0f), _CMP_NLT_UQ));
  result.v = _mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
#endif
  return result;
}

// x / (1 + e^-x), within 1e-6 of its size. e^-x = 2^t with t = n + f, |f| <= 1/2; the polynomial is the Taylor series of 2^f.
// t is kept where neither 2^t nor its reciprocal leaves the normal numbers: beyond, the result is x, or as good as zero.
inline Vec silu(Vec x) {
  Vec t = x * Vec::all(-1.44269504088896341f);
  t = min(Vec::all(126.0f), max(Vec::all(-126.0f), t));  // of a NaN, max and min return the second operand
  Vec n = round_even(t);
  Vec f = t - n;
  Vec p = Vec::all(1.5403530e-4f);
  p = fma(p, f, Vec::all(1.3333558e-3f));
  p = fma(p, f, Vec::all(9.6181291e-3f));
  p = fma(p, f, Vec::all(5.5504109e-2f));
  p = fma(p, f, Vec::all(2.4022651e-1f));
  p = fma(p, f, Vec::all(6.9314718e-1f));
  p = fma(p, f, Vec::all(1.0f));
#if defined(__AVX512F__)
  Vec d = Vec{_mm512_scalef_ps(p.v, n.v)} + Vec::all(1.0f);
  Vec r = {_mm512_rcp14_ps(d.v)};  // 14 bits; one step of Newton's doubles them
  r = fma(r, fnma(d, r, Vec::all(1.0f)), r);
  return x * r;
#else
  return x / (p * exp2_whole(n) + Vec::all(1.0f));
#endif
}

// What storing in T and reading back gives: the rounding that separate ops would have done in between.
template <class T>
Vec rounded_to(Vec x);
template <>
inline Vec rounded_to<float>(Vec x) {
  return x;
}
template <>
inline Vec rounded_to<bf16>(Vec x) {
#if defined(__AVX512F__)
  __m512i bits = _mm512_castps_si512(x.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  up = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_ORD_Q), _mm512_castsi512_ps(up))};
#else
  __m256i bits = _mm256_castps_si256(x.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  up = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  return {_mm256_blendv_ps(x.v, _mm256_castsi256_ps(up), _mm256_cmp_ps(x.v, x.v, _CMP_ORD_Q))};
#endif
}

// Calls body(i, n) for each vector of `length` elements: i is its first element, n how many it holds. In whole vectors n
// is a constant to the compiler, which then leaves out the masks.
template <class Body>
inline __attribute__((always_inline)) void sweep(int64_t length, const Body& body) {
  int64_t i = 0;
  for (; i + Vec::width <= length; i += Vec::width) body(i, std::integral_constant<int, Vec::width>());
  if (i < length) body(i, static_cast<int>(length - i));
}

// The sum of the squares of n elements, in an order that n alone decides.
template <class T>
inline float sum_of_squares(const T* x, int64_t n) {
  constexpr int w = Vec::width;
  Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    for (int j = 0; j < 4; j++) {
      Vec part = Vec::load(x + i + j * w);
      sums[j] = fma(part, part, sums[j]);
    }
  }
  for (; i < n; i += w) {
    Vec part = Vec::load(x + i, static_cast<int>(n - i));
    sums[0] = fma(part, part, sums[0]);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

}  // namespace skyline
