// The inner kernels of matrix products for AVX2, which multiplies neither bfloat16 nor int8 at full width: up to 6 rows of A
// by 16 or 32 columns of a panel.
//
// Floating-point products are made of float32 multiply-adds, whatever the weight is kept as; rows of A are float32 in memory,
// from where an instruction spreads one element over a vector. int8 is widened to 16 bits, so that VPMADDWD adds exact pairs.
// int4 levels are small enough for VPMADDUBSW, whose sums of two products, and of eight, still fit 16 bits.
#pragma once

#include "packed.h"
#include "repeat.h"
#include "simd.h"

namespace skyline {

constexpr int64_t kRowBlock = 6;  // by two vectors: 12 accumulators of 16 registers

inline __m256i load_whole(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// What a panel is made of: blocks of k, in which two tiles follow each other. A vector is eight columns at two (or four)
// consecutive k, whose first and second halves are multiplied by what `spread` makes of a row of A.
struct Bf16Pairs {
  static constexpr int64_t k = 32, bytes = 2048, vector = 32;
  template <int half>
  static __m256 columns(const uint8_t* p) {
    const __m256i both = load_whole(p);
    if constexpr (half == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }
  static __m256 spread(const float* a) { return _mm256_broadcast_ss(a); }
  static __m256 widened(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct Int8Pairs {
  static constexpr int64_t k = 32, bytes = 1024, vector = 16;
  template <int half>
  static __m256 columns(const uint8_t* p) {
    __m256i both = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if constexpr (half == 0) both = _mm256_slli_epi32(both, 16);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(both, 16));
  }
  static __m256 spread(const float* a) { return _mm256_broadcast_ss(a); }
  static __m256 widened(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
// Rows of A are int8 in 16 bits, each four in the order 0 2 1 3: what is even and what is odd in a four of B are pairs.
struct Int8Fours {
  static constexpr int64_t k = 64, bytes = 2048, vector = 32;
  template <int half>
  static __m256i columns(const uint8_t* p) {
    __m256i four = load_whole(p);
    if constexpr (half == 0) four = _mm256_slli_epi16(four, 8);
    return _mm256_srai_epi16(four, 8);
  }
  static __m256i spread(const int16_t* a) { return spread_four(a); }
  static __m256i widened(const uint8_t* p) { return load_whole(p); }
};

// To the compiler, a value that it knows nothing about: it would put off additions until it ran out of registers.
template <class V>
inline __attribute__((always_inline)) V settled(V v) {
  asm("" : "+x"(v));
  return v;
}

inline __m256 multiply_add(__m256 sum, __m256 x, __m256 y) { return _mm256_fmadd_ps(x, y, sum); }
inline __m256i multiply_add(__m256i sum, __m256i x, __m256i y) { return settled(_mm256_add_epi32(sum, _mm256_madd_epi16(x, y))); }

inline __m256 load_sums(const float* p) { return _mm256_loadu_ps(p); }
inline __m256i load_sums(const int32_t* p) { return load_whole(p); }
inline void store_sums(float* p, __m256 v) { _mm256_storeu_ps(p, v); }
inline void store_sums(int32_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

// c [R][8 V] (+)= R rows of A times V vectors of columns, from vector `first` of the panel on.
template <class Panel, int R, int V, class A, class C>
inline void multiply_part(const A* a, int64_t lda, const uint8_t* b, int first, int64_t steps, C* c, bool accumulate, Ahead ahead) {
  constexpr int64_t tile = Panel::bytes / 2, part = Panel::k / 16;
  c += 8 * first;
  decltype(load_sums(c)) acc[R][V] = {};
  if (accumulate)
    repeat<R>(SKYLINE_EACH(r) { repeat<V>(SKYLINE_EACH(v) { acc[r][v] = load_sums(c + r * kPanel + 8 * v); }); });
  b += first / 2 * tile;
  for (int64_t s = 0; s < steps; s++, b += Panel::bytes, a += Panel::k)
    repeat<V / 2>(SKYLINE_EACH(t) {  // tile by tile: memory is fastest in its own order
      const uint8_t* at = b + t * tile;
      for (int i = 0; i < 16; i++, at += 2 * Panel::vector) {
        const A* x = a + i * part;
        ahead.ask();
        repeat<2>(SKYLINE_EACH(half) {
          decltype(load_sums(c)) columns[2];
          repeat<2>(SKYLINE_EACH(v) { columns[v] = Panel::template columns<half>(at + v * Panel::vector); });
          repeat<R>(SKYLINE_EACH(r) {
            const auto all = Panel::spread(x + r * lda + half * part / 2);
            repeat<2>(SKYLINE_EACH(v) { acc[r][2 * t + v] = multiply_add(acc[r][2 * t + v], all, columns[v]); });
          });
        });
      }
    });
  repeat<R>(SKYLINE_EACH(r) { repeat<V>(SKYLINE_EACH(v) { store_sums(c + r * kPanel + 8 * v, acc[r][v]); }); });
}

// c [rows][32] (+)= rows <= kRowBlock of A (row stride lda) times `steps` blocks of the panel.
template <class Panel, class A, class C, int R = static_cast<int>(kRowBlock)>
void multiply(const A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps, C* c, bool accumulate, Ahead ahead) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<Panel, A, C, R - 1>(a, lda, rows, b, steps, c, accumulate, ahead);
  }
  if constexpr (R <= 3) {
    multiply_part<Panel, R, 4>(a, lda, b, 0, steps, c, accumulate, ahead);
  } else {
    multiply_part<Panel, R, 2>(a, lda, b, 0, steps, c, accumulate, ahead.part(0, 2));
    multiply_part<Panel, R, 2>(a, lda, b, 2, steps, c, accumulate, ahead.part(1, 2));
  }
}

// A panel's columns as they are multiplied, for blocks of rows to share: of each pair (or four) of k the four vectors of its
// first half, then those of its second. Widened pairs of bfloat16 lie as a float32 panel does.
template <class Panel>
inline void widen(const uint8_t* b, int64_t steps, uint8_t* to) {
  for (int64_t s = 0; s < steps; s++, b += Panel::bytes)
    for (int i = 0; i < 16; i++, to += 256)
      repeat<4>(SKYLINE_EACH(v) {
        const uint8_t* at = b + v / 2 * (Panel::bytes / 2) + (2 * i + v % 2) * Panel::vector;
        repeat<2>(SKYLINE_EACH(half) {
          const auto columns = Panel::template columns<half>(at);
          std::memcpy(to + 128 * half + 32 * v, &columns, 32);
        });
      });
}

// Widens `blocks` blocks of 32 k of an FP4 panel to the bfloat16 layout, times their groups' scales: exact in it.
template <int64_t group>
inline void widen_fp4(const uint8_t* scales, const uint8_t* from, int64_t blocks, uint8_t* to) {
  alignas(32) uint8_t low_bytes[32], high_bytes[32];
  for (int i = 0; i < 32; i++) {
    low_bytes[i] = static_cast<uint8_t>(kE2m1Bits[i % 16]);
    high_bytes[i] = static_cast<uint8_t>(kE2m1Bits[i % 16] >> 8);
  }
  const __m256i lows = load_whole(low_bytes), highs = load_whole(high_bytes), nibble = _mm256_set1_epi16(15);
  const __m256i size_bits = _mm256_set1_epi16(0x7FFF), high_half = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int64_t block = 0; block < blocks; block++, scales += 32 * 32 / group, from += 512, to += 2048)
    for (int part = 0; part < 4; part++) {  // eight rows
      __m256i exponents;  // E8M0
      __m256 factors[2];  // E4M3, made by moving its bits; 2^120 makes up for the difference in what exponents count from
      for (int g = 0; g < 32 / group; g++) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + 32 * g + 8 * part)));
        if constexpr (group == 32) {
          const __m256i shifted = _mm256_slli_epi32(_mm256_sub_epi32(wide, _mm256_set1_epi32(127)), 7);
          exponents = _mm256_blend_epi16(shifted, _mm256_slli_epi32(shifted, 16), 0xAA);
        } else {
          const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x80)), 24);
          const __m256i size = _mm256_slli_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(0x7F)), 20);
          factors[g] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, size)), _mm256_set1_ps(0x1p120f));
        }
      }
      const int64_t tile = part / 2, half = part % 2 * 32;
      for (int q = 0; q < 4; q++) {
        const uint8_t* at = from + 256 * tile + 64 * q + half;
        if (half == 0) ask_for(at + kAhead);
        const __m256i words = load_whole(at);
        repeat<4>(SKYLINE_EACH(n) {
          const __m256i code = _mm256_and_si256(_mm256_srli_epi16(words, 4 * n), nibble);  // its upper byte's number is 0
          __m256i pair = _mm256_or_si256(_mm256_shuffle_epi8(lows, code), _mm256_slli_epi16(_mm256_shuffle_epi8(highs, code), 8));
          if constexpr (group == 32) {
            const __m256i none = _mm256_cmpeq_epi16(_mm256_and_si256(pair, size_bits), _mm256_setzero_si256());
            pair = _mm256_add_epi16(pair, _mm256_andnot_si256(none, exponents));
          } else {
            const __m256 first = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), factors[q / 2]);
            const __m256 second = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(pair, high_half)), factors[q / 2]);
            pair = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second));
          }
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 1024 * tile + 64 * (4 * q + n) + half), pair);
        });
      }
    }
}

// The same of an FP8 panel (float8_e4m3fn), without its scales. Numbers are made by moving their bits; 2^120 makes up for the
// difference in what exponents count from.
inline void widen_fp8(const uint8_t* from, int64_t blocks, uint8_t* to) {
  const __m256i bits = _mm256_set1_epi16(static_cast<int16_t>(0x87F0)), high_half = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m256 factor = _mm256_set1_ps(0x1p120f);
  for (int64_t tile = 0; tile < 2 * blocks; tile++, to += 1024)
    for (int line = 0; line < 8; line++, from += 64) {
      ask_for(from + kAhead);
      repeat<2>(SKYLINE_EACH(half) {
        const __m256i bytes = load_whole(from + 32 * half), none = _mm256_setzero_si256();
        const __m256i words[2] = {_mm256_unpacklo_epi8(none, bytes), _mm256_unpackhi_epi8(none, bytes)};
        repeat<2>(SKYLINE_EACH(n) {
          const __m256i moved = _mm256_and_si256(_mm256_srai_epi16(words[n], 4), bits);
          const __m256 first = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(moved, 16)), factor);
          const __m256 second = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(moved, high_half)), factor);
          const __m256i pair = _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * (2 * line + n) + 32 * half), pair);
        });
      });
    }
}

// 32 k of six bits as bytes.
inline void unpack_six_bits(const uint8_t* from, uint8_t* to) {
  const __m256i nibble = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30), middle = _mm256_set1_epi8(32);
  for (int t = 0; t < 2; t++, from += 384, to += 512)
    for (int half = 0; half < 64; half += 32)
      repeat<8>(SKYLINE_EACH(line) {
        constexpr int at = 2 * (line % 4);  // of the two bits, which go to 4
        const __m256i lower = load_whole(from + 64 * (line / 2) + half), bits = load_whole(from + 256 + 64 * (line / 4) + half);
        const __m256i low = line % 2 ? _mm256_srli_epi16(lower, 4) : lower;
        const __m256i high = at < 4 ? _mm256_slli_epi16(bits, 4 - at) : _mm256_srli_epi16(bits, at - 4);
        const __m256i level = _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(high, two));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * line + half), _mm256_sub_epi8(level, middle));
      });
}

// Widens `blocks` blocks of 32 k of bytes or six bits, from k0 on, to the bfloat16 layout: a level times factor * scale, less offset *
// minimum, rounded. In groups of 32 scales and minima are 1.
template <int64_t group, bool offsets, bool six>
inline void widen_bytes(const PackedMatrix& m, const uint8_t* panel, int64_t k0, int64_t blocks, uint8_t* to) {
  const __m256i twice[2] = {_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)};
  constexpr int parts = offsets ? 2 : 1;
  alignas(32) uint8_t bytes[1024];
  const uint8_t* values = panel + m.heads_bytes() + k0 / 32 * m.step_bytes();
  for (int64_t block = 0; block < blocks; block++, k0 += 32, values += m.step_bytes(), to += 2048) {
    const uint8_t* head = panel + k0 / m.head_k() * m.head_bytes();
    for (int64_t at = 0; at < m.step_bytes(); at += 64) ask_for(values + kAhead + at);
    if constexpr (six) unpack_six_bits(values, bytes);
    const uint8_t* from = six ? bytes : values;
    for (int eight = 0; eight < 4; eight++)  // rows
      for (int64_t g = 0; g < 32 / group; g++) {
        __m256 scale[2], minimum[2] = {};
        for (int part = 0; part < parts; part++) {
          __m256 rows = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(head + 64 * part + 16 * eight)));
          if constexpr (group == 16) {
            const uint8_t* small = head + 64 * parts + part * (kSuper / 16 * kPanel) + (k0 % kSuper / 16 + g) * kPanel + 8 * eight;
            const __m128i eight_bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(small));
            const __m256i whole = part ? _mm256_cvtepu8_epi32(eight_bytes) : _mm256_cvtepi8_epi32(eight_bytes);
            rows = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), rows);
          }
          for (int half = 0; half < 2; half++) (part ? minimum : scale)[half] = _mm256_permutevar8x32_ps(rows, twice[half]);
        }
        for (int64_t pair = g * group / 2; pair < (g + 1) * group / 2; pair++) {
          const uint8_t* at = from + eight / 2 * 512 + 32 * pair + eight % 2 * 16;
          bf16* out = reinterpret_cast<bf16*>(to + eight / 2 * 1024 + 64 * pair + eight % 2 * 32);
          repeat<2>(SKYLINE_EACH(half) {
            const __m128i eight_bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * half));
            Vec value{_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes))};
            value.v = offsets ? _mm256_fmsub_ps(value.v, scale[half], minimum[half]) : _mm256_mul_ps(value.v, scale[half]);
            value.store(out + 8 * half);
          });
        }
      }
  }
}

constexpr int64_t kWideRows = 3;  // by four vectors: fewer elements of A to spread than with six rows and two vectors

// c [rows][32] (+)= rows <= kWideRows of A times widened columns.
template <class Panel, class A, class C, int R = static_cast<int>(kWideRows)>
void multiply_widened(const A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps, C* c, bool accumulate, Ahead ahead) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_widened<Panel, A, C, R - 1>(a, lda, rows, b, steps, c, accumulate, ahead);
  }
  constexpr int64_t part = Panel::k / 16;
  decltype(load_sums(c)) acc[R][4] = {};
  if (accumulate)
    repeat<R>(SKYLINE_EACH(r) { repeat<4>(SKYLINE_EACH(v) { acc[r][v] = load_sums(c + r * kPanel + 8 * v); }); });
  for (int64_t i = 0; i < 16 * steps; i++, b += 256, a += part) {
    ahead.ask();
    repeat<2>(SKYLINE_EACH(half) {
      repeat<R>(SKYLINE_EACH(r) {
        const auto all = Panel::spread(a + r * lda + half * part / 2);
        repeat<4>(SKYLINE_EACH(v) { acc[r][v] = multiply_add(acc[r][v], all, Panel::widened(b + 128 * half + 32 * v)); });
      });
    });
  }
  repeat<R>(SKYLINE_EACH(r) { repeat<4>(SKYLINE_EACH(v) { store_sums(c + r * kPanel + 8 * v, acc[r][v]); }); });
}

// R rows of A times eight columns of an int4 group, from vector `vec` of the panel on: sums of levels 0 to 15 times x. A sum of
// eight products in 16 bits is at most 8 * 2 * 15 * 127.
template <int R>
inline __attribute__((always_inline)) void multiply_levels(const int8_t* a, int64_t lda, const uint8_t* b, int vec, int64_t blocks,
                                                           __m256i (&sums)[R]) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  b += vec / 2 * 256 + vec % 2 * 32;
  repeat<R>(SKYLINE_EACH(r) { sums[r] = _mm256_setzero_si256(); });
  for (int64_t block = 0; block < blocks; block++, b += 512, a += 32) {
    __m256i acc[R];
    repeat<4>(SKYLINE_EACH(part) {
      const __m256i bytes = load_whole(b + part * 64);
      const __m256i low = _mm256_and_si256(bytes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
      repeat<R>(SKYLINE_EACH(r) {
        const int8_t* x = a + r * lda + part * 4;
        const __m256i product = _mm256_maddubs_epi16(low, spread_four(x));
        acc[r] = part == 0 ? product : settled(_mm256_add_epi16(acc[r], product));
        acc[r] = settled(_mm256_add_epi16(acc[r], _mm256_maddubs_epi16(high, spread_four(x + 16))));
      });
    });
    repeat<R>(SKYLINE_EACH(r) { sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(acc[r], ones)); });
  }
}

// Levels of int4, a byte each, for blocks of rows to share: of each four of k the four vectors of columns.
inline void widen_levels(const uint8_t* b, int64_t blocks, uint8_t* to) {
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t block = 0; block < blocks; block++, b += 512, to += 1024)
    repeat<4>(SKYLINE_EACH(part) {
      repeat<4>(SKYLINE_EACH(vec) {
        const __m256i bytes = load_whole(b + vec / 2 * 256 + vec % 2 * 32 + part * 64);
        const __m256i low = _mm256_and_si256(bytes, nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * 128 + vec * 32), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (part + 4) * 128 + vec * 32), high);
      });
    });
}

constexpr int64_t kLevelRows = 5;  // by two vectors of widened levels

// R rows of A times 32 widened levels of two vectors of columns: sums of eight products in 16 bits, as in multiply_levels.
template <int R>
inline __attribute__((always_inline)) void multiply_widened_levels(const int8_t* a, int64_t lda, const uint8_t* b, __m256i (&acc)[R][2]) {
  const int8_t* rows[R];
  repeat<R>(SKYLINE_EACH(r) {
    rows[r] = a + r * lda;
    asm("" : "+r"(rows[r]));  // in a register of its own: GCC would compute all addresses anew
  });
  repeat<8>(SKYLINE_EACH(four) {
    const __m256i levels[2] = {load_whole(b + four * 128), load_whole(b + four * 128 + 32)};
    repeat<R>(SKYLINE_EACH(r) {
      const __m256i all = _mm256_broadcastd_epi32(_mm_loadu_si32(rows[r] + 4 * four));
      repeat<2>(SKYLINE_EACH(v) {
        const __m256i product = _mm256_maddubs_epi16(levels[v], all);
        acc[r][v] = settled(four == 0 ? product : _mm256_add_epi16(acc[r][v], product));
      });
    });
  });
}

}  // namespace skyline
