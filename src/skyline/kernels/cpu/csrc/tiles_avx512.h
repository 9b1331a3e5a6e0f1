// The inner kernels of matrix products for AVX-512 with VNNI and BF16, and for AMX: included by tiles.h.
#pragma once

#include "amx.h"
#include "byte_numbers.h"
#include "packed.h"
#include "repeat.h"
#include "simd.h"

namespace skyline {

#if defined(__AMX_TILE__)

constexpr int64_t kRowBlock = 32;
constexpr int kAskingRows = 1;  // from so many on, memory is asked for ahead

// Tiles 0-3 accumulate (rows 0-15 and 16-31, by columns 0-15 and 16-31), 4 and 5 are rows of A, 6 and 7 columns of B.
class TileShape {
 public:
  // depth: bytes of A's rows, 4 for each row of B.
  void set(int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows;
    depth_ = depth;
    TileConfig config;
    const int64_t first = std::min<int64_t>(rows, 16), second = rows > 16 ? rows - 16 : 1;
    const int64_t heights[8] = {first, first, second, second, first, second, depth / 4, depth / 4};
    for (int i = 0; i < 8; i++) config.set(i, heights[i], i == 4 || i == 5 ? depth : 64);
    config.load();
  }

 private:
  int64_t rows_ = 0, depth_ = 0;
};

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
};
struct Int8Step {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
};
struct Int8HalfStep {
  using A = int8_t;
  using C = int32_t;
  static constexpr int64_t k = 32;
};

// c [rows][32] (+)= a [rows, steps * k] (row stride lda) times the panel's blocks at b.
template <class Step>
void multiply(TileShape& shape, const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps,
              typename Step::C* c, bool accumulate, bool stream = false) {
  constexpr bool integer = sizeof(typename Step::A) == 1;
  constexpr int64_t depth = Step::k * static_cast<int64_t>(sizeof(*a)), tile = depth * kTile;  // in bytes
  const int64_t stride = lda * static_cast<int64_t>(sizeof(*a));
  tile_fence();
  shape.set(rows, depth);
  if (rows <= 16) {
    if (accumulate) {
      _tile_loadd(0, c, 128);
      _tile_loadd(1, c + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2 * tile) {
      if (stream) prefetch<32>(b);
      _tile_loadd(4, a, stride);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + tile, 64);
      if constexpr (integer) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    return;
  }
  const typename Step::A* a2 = a + 16 * lda;
  typename Step::C* c2 = c + 16 * kPanel;
  if (accumulate) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c2, 128);
    _tile_loadd(3, c2 + 16, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s++, a += Step::k, a2 += Step::k, b += 2 * tile) {
    if (stream) prefetch<32>(b);
    _tile_loadd(4, a, stride);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + tile, 64);
    _tile_loadd(5, a2, stride);
    if constexpr (integer) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c2, 128);
  _tile_stored(3, c2 + 16, 128);
}

#else

constexpr int64_t kRowBlock = 12;  // 24 accumulators, 2 columns, 1 row, of 32 registers
constexpr int kAskingRows = 2;     // from so many on, memory is asked for ahead; for one, the hardware does better alone (Zen 5)

struct Bf16Step {
  using A = bf16;
  using C = float;
  static constexpr int64_t k = 32;
  using V = __m512;
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* c) { return _mm512_loadu_ps(c); }
  static void store(float* c, V v) { _mm512_storeu_ps(c, v); }
  static __m512i spread(const bf16* a) { return spread_four(a); }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
};

// VPDPBUSD takes an unsigned by a signed factor: rows of A are kept with 128 added, and the caller takes 128 * sum(b) off again.
struct Int8Step {
  using A = uint8_t;
  using C = int32_t;
  static constexpr int64_t k = 64;
  using V = __m512i;
  static V zero() { return _mm512_setzero_si512(); }
  static V load(const int32_t* c) { return _mm512_loadu_si512(c); }
  static void store(int32_t* c, V v) { _mm512_storeu_si512(c, v); }
  static __m512i spread(const uint8_t* a) { return spread_four(a); }
  static V dot(V acc, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

// c [R][32] (+)= sums * scales of the columns.
template <int R>
inline void add_scaled(const __m512 (&sums)[R][2], const float* scales, float* c, bool accumulate) {
  repeat<2>(SKYLINE_EACH(t) {
    const __m512 scale = _mm512_loadu_ps(scales + 16 * t);
    repeat<R>(SKYLINE_EACH(r) {
      float* to = c + r * kPanel + 16 * t;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(sums[r][t], scale, accumulate ? _mm512_loadu_ps(to) : _mm512_setzero_ps()));
    });
  });
}

// c [rows][32] (+)= rows <= kRowBlock of A (row stride lda) times `steps` blocks of the panel, and, if there are scales of its
// columns (of float sums only), times those.
template <class Step, int R = static_cast<int>(kRowBlock)>
void multiply(const typename Step::A* a, int64_t lda, int64_t rows, const uint8_t* b, int64_t steps, typename Step::C* c,
              bool accumulate, Ahead ahead, const float* scales = nullptr) {
  if constexpr (R > 1) {
    if (rows < R) return multiply<Step, R - 1>(a, lda, rows, b, steps, c, accumulate, ahead, scales);
  }
  typename Step::V acc[R][2];
  const bool go_on = accumulate && !scales;
  repeat<R>(SKYLINE_EACH(r) {
    repeat<2>(SKYLINE_EACH(t) { acc[r][t] = go_on ? Step::load(c + r * kPanel + 16 * t) : Step::zero(); });
  });
  constexpr int64_t a_part = Step::k / 16;
  for (int64_t s = 0; s < steps; s++, a += Step::k, b += 2048)
    for (int p = 0; p < 16; p++) {
      if constexpr (R >= kAskingRows) ahead.ask(), ahead.ask();
      const __m512i left = _mm512_loadu_si512(b + 64 * p), right = _mm512_loadu_si512(b + 1024 + 64 * p);
      repeat<R>(SKYLINE_EACH(r) {
        const __m512i x = Step::spread(a + r * lda + p * a_part);
        acc[r][0] = Step::dot(acc[r][0], x, left);
        acc[r][1] = Step::dot(acc[r][1], x, right);
      });
    }
  if constexpr (std::is_same_v<typename Step::C, float>) {
    if (scales) return add_scaled<R>(acc, scales, c, accumulate);
  }
  repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { Step::store(c + r * kPanel + 16 * t, acc[r][t]); }); });
}

#endif

// What an int8 weight-only panel is as bfloat16: `pair<t, n>(q)` are the columns of tile t at the (4 q + n)-th pair of k of the
// block that `begin` was called for. Integers up to 256 are exact in it.
class Int8Columns {
 public:
  explicit Int8Columns(const uint8_t* panel) : from_(panel - 1024) {}
  void begin() {
    from_ += 1024;
    prefetch<16>(from_);
  }
  template <int t, int n>
  __m512i pair(int64_t q) const {
    const __m128i* at = reinterpret_cast<const __m128i*>(from_ + 512 * t + 32 * (4 * q + n));
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

 private:
  const uint8_t* from_;
};

// The same of an FP4 panel, times its groups' scales: exact too.
template <int64_t group>
class Fp4Columns {
 public:
  Fp4Columns(const uint8_t* scales, const uint8_t* values) : scales_(scales), from_(values - 512) {}
  void begin() {
    from_ += 512;
    prefetch<8>(from_);
    repeat<2>(SKYLINE_EACH(t) {
      repeat<32 / group>(SKYLINE_EACH(g) {
        const __m128i* bytes = reinterpret_cast<const __m128i*>(scales_ + 32 * g + 16 * t);
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
        if constexpr (group == 32) {  // E8M0
          const __m512i shifted = _mm512_slli_epi32(_mm512_sub_epi32(wide, _mm512_set1_epi32(127)), 7);
          factors_[t][g] = _mm512_ternarylogic_epi32(high_half(), _mm512_slli_epi32(shifted, 16), shifted, 0xCA);
        } else {  // E4M3, whose bits are moved; 2^120 makes up for the difference in what exponents count from
          const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x80)), 24);
          const __m512i size = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x7F)), 20);
          const __m512 factor = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_or_si512(sign, size)), _mm512_set1_ps(0x1p120f));
          factors_[t][g] = _mm512_castps_si512(factor);
        }
      });
    });
    scales_ += 32 * 32 / group;
  }
  template <int t, int n>
  __m512i pair(int64_t q) const {
    const __m512i words = _mm512_loadu_si512(from_ + 256 * t + 64 * q);
    // Only the lowest five bits of a word count, and the table is there twice.
    const __m512i numbers = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * n), table_);
    if constexpr (group == 32) {
      const __mmask32 there = _mm512_test_epi16_mask(numbers, _mm512_set1_epi16(0x7FFF));
      return _mm512_mask_add_epi16(numbers, there, numbers, factors_[t][0]);
    } else {
      const __m512 factor = _mm512_castsi512_ps(factors_[t][q / 2]);
      const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(numbers, 16)), factor);
      const __m512 odd = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(numbers, high_half())), factor);
      return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), _mm512_castps_si512(odd));
    }
  }

 private:
  static __m512i high_half() { return _mm512_set1_epi32(static_cast<int>(0xFFFF0000)); }
  static __m512i twice(const uint16_t (&numbers)[16]) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
  }
  const uint8_t *scales_, *from_;
  const __m512i table_ = twice(kE2m1Bits);
  __m512i factors_[2][32 / group];
};

// The same of an FP8 panel, without its scales.
class Fp8Columns {
 public:
  explicit Fp8Columns(const uint8_t* values) : from_(values - 1024) {}
  void begin() {
    from_ += 1024;
    prefetch<16>(from_);
  }
  template <int t, int n>
  __m512i pair(int64_t q) const {
    __m512i both[2];
    numbers_.widen(_mm512_loadu_si512(from_ + 512 * t + 64 * (2 * q + n / 2)), both[0], both[1]);
    return both[n % 2];
  }

 private:
  const uint8_t* from_;
  const ByteNumbers<E4m3> numbers_;
};

// 32 k of six bits as bytes.
inline void unpack_six_bits(const uint8_t* from, uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30), middle = _mm512_set1_epi8(32);
  repeat<2>(SKYLINE_EACH(t) {
    __m512i lower[4], upper[2];
    repeat<4>(SKYLINE_EACH(i) { lower[i] = _mm512_loadu_si512(from + 384 * t + 64 * i); });
    repeat<2>(SKYLINE_EACH(i) { upper[i] = _mm512_loadu_si512(from + 384 * t + 256 + 64 * i); });
    repeat<8>(SKYLINE_EACH(line) {
      constexpr int at = 2 * (line % 4);  // of the two bits, which go to 4
      const __m512i low = line % 2 ? _mm512_srli_epi16(lower[line / 2], 4) : lower[line / 2], bits = upper[line / 4];
      const __m512i high = at < 4 ? _mm512_slli_epi16(bits, 4 - at) : _mm512_srli_epi16(bits, at - 4);
      const __m512i level = _mm512_or_si512(_mm512_and_si512(low, nibble), _mm512_and_si512(high, two));
      _mm512_store_si512(to + 512 * t + 64 * line, _mm512_sub_epi8(level, middle));
    });
  });
}

// Of bytes, or six bits, what they stand for rounded to bfloat16: a level times factor * scale, less offset * minimum. In groups of
// 32 scales and minima are 1.
template <int64_t group, bool offsets, bool six>
class ByteColumns {
 public:
  ByteColumns(const PackedMatrix& m, const uint8_t* panel, int64_t k0)
      : head_(panel + k0 / kHeadK * kHeadBytes - (group == 32 ? kHeadBytes : 0)),
        from_(panel + m.heads_bytes() + (k0 / 32 - 1) * kStep),
        part_(k0 % kHeadK / 32) {
    if constexpr (group == 16) read_head();
  }
  void begin() {
    from_ += kStep;
    prefetch<kStep / 64>(from_);
    if constexpr (six) unpack_six_bits(from_, bytes_);
    if constexpr (group == 32) {
      head_ += kHeadBytes;
      read_head();
      repeat<kParts>(SKYLINE_EACH(part) { repeat<2>(SKYLINE_EACH(t) { spread(factors_[0][part][t], wide_[part][t]); }); });
    } else {
      if (part_ == 8) {
        part_ = 0;
        head_ += kHeadBytes;
        read_head();
      }
      repeat<2>(SKYLINE_EACH(g) {
        const uint8_t* scales = head_ + 64 * kParts + (2 * part_ + g) * kPanel;
        repeat<2>(SKYLINE_EACH(t) {
          const __m512i scale = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * t)));
          spread(factors_[g][0][t], _mm512_mul_ps(_mm512_cvtepi32_ps(scale), wide_[0][t]));
          if constexpr (offsets) {
            const __m128i* minima = reinterpret_cast<const __m128i*>(scales + kSuper / 16 * kPanel + 16 * t);
            const __m512i minimum = _mm512_cvtepu8_epi32(_mm_loadu_si128(minima));
            spread(factors_[g][1][t], _mm512_mul_ps(_mm512_cvtepi32_ps(minimum), wide_[1][t]));
          }
        });
      });
      part_++;
    }
  }
  template <int t, int n>
  __m512i pair(int64_t q) const {
    const __m128i* at = reinterpret_cast<const __m128i*>((six ? bytes_ : from_) + 512 * t + 32 * (4 * q + n));
    const auto& factors = factors_[group == 32 ? 0 : q / 2];
    __m512 rows[2];
    repeat<2>(SKYLINE_EACH(half) {
      const __m512 level = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at + half)));
      if constexpr (offsets) {
        rows[half] = _mm512_fmsub_ps(level, factors[0][t][half], factors[1][t][half]);
      } else {
        rows[half] = _mm512_mul_ps(level, factors[0][t][half]);
      }
    });
    return (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
  }

 private:
  static constexpr int kParts = offsets ? 2 : 1;
  static constexpr int64_t kHeadK = group == 32 ? 32 : kSuper, kStep = six ? 768 : 1024;
  static constexpr int64_t kHeadBytes = (group == 32 ? 64 : 64 + kSuper / 16 * kPanel) * kParts;
  void read_head() {
    repeat<kParts>(SKYLINE_EACH(part) {
      repeat<2>(SKYLINE_EACH(t) {
        wide_[part][t] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(head_ + 64 * part + 32 * t)));
      });
    });
  }
  // Each row's number for the two of a pair.
  static void spread(__m512 (&to)[2], __m512 rows) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    to[0] = _mm512_permutexvar_ps(first, rows);
    to[1] = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), rows);
  }
  const uint8_t *head_, *from_;
  int64_t part_;
  __m512 wide_[kParts][2];                          // a head's factors, and offsets
  __m512 factors_[group == 32 ? 1 : 2][kParts][2][2];  // of 32 k: for each group and tile, of its first and last eight rows
  alignas(64) uint8_t bytes_[six ? 1024 : 1];
};

// Writes `blocks` blocks of 32 k in the bfloat16 layout.
template <class Columns>
inline void widen(Columns columns, int64_t blocks, uint8_t* to) {
  for (int64_t i = 0; i < blocks; i++, to += 2048) {
    columns.begin();
    repeat<4>(SKYLINE_EACH(q) {
      __m512i pairs[2][4];  // all of them before any is stored: what two have in common is computed once
      repeat<2>(SKYLINE_EACH(t) { repeat<4>(SKYLINE_EACH(n) { pairs[t][n] = columns.template pair<t, n>(q); }); });
      repeat<2>(SKYLINE_EACH(t) {
        repeat<4>(SKYLINE_EACH(n) { _mm512_storeu_si512(to + 1024 * t + 64 * (4 * q + n), pairs[t][n]); });
      });
    });
  }
}

constexpr int64_t kPassingRows = 8;  // up to so many are multiplied by columns as they are made

#if !defined(__AMX_TILE__)

// c [rows][32] = rows <= kPassingRows of A times `blocks` blocks, in the order of `multiply`; with scales of the columns, times
// those, and added to c if `accumulate`.
template <class Columns, int R = static_cast<int>(kPassingRows)>
void multiply_in_passing(const bf16* a, int64_t lda, int64_t rows, Columns& columns, int64_t blocks, float* c, bool accumulate,
                         const float* scales) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_in_passing<Columns, R - 1>(a, lda, rows, columns, blocks, c, accumulate, scales);
  }
  __m512 acc[R][2];
  repeat<R>(SKYLINE_EACH(r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
  for (int64_t i = 0; i < blocks; i++) {
    columns.begin();
    for (int q = 0; q < 4; q++, a += 8)
      repeat<4>(SKYLINE_EACH(n) {
        const __m512i left = columns.template pair<0, n>(q), right = columns.template pair<1, n>(q);
        repeat<R>(SKYLINE_EACH(r) {
          const __m512i x = spread_four(a + r * lda + 2 * n);
          acc[r][0] = Bf16Step::dot(acc[r][0], x, left);
          acc[r][1] = Bf16Step::dot(acc[r][1], x, right);
        });
      });
  }
  if (scales) return add_scaled<R>(acc, scales, c, accumulate);
  repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { _mm512_storeu_ps(c + r * kPanel + 16 * t, acc[r][t]); }); });
}

#endif

constexpr int64_t kLevelRows = 8;  // of A at once: 16 accumulators, 4 vectors of levels, 2 of a row, 1 mask, of 32 registers

// int4 levels 0 to 15 times R rows of A, for the `blocks` blocks of 32 k of one group at b, in whole numbers: sums [R][2] of 16
// columns each. Unlike signed ones, levels go into the instructions as they are; -8 * a_sums, of the group, undoes the shift.
template <int R>
inline __attribute__((always_inline)) void multiply_levels(const int8_t* a, int64_t lda, const int32_t* a_sums, const uint8_t* b,
                                                           int64_t blocks, __m512i (&sums)[R][2], Ahead& ahead) {
  constexpr bool two = R <= 4;  // chains of additions to a sum: with few rows, one would wait for itself
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i more[R][2];
  repeat<R>(SKYLINE_EACH(r) {
    sums[r][0] = sums[r][1] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(_mm512_set1_epi32(a_sums[r]), 3));
    more[r][0] = more[r][1] = _mm512_setzero_si512();
  });
  for (int64_t block = 0; block < blocks; block++, a += 16, b += 256)
    for (int part = 0; part < 4; part++, a += 4, b += 64) {  // not unrolled: addresses would take more registers than there are
      if constexpr (R >= kAskingRows) ahead.ask(), ahead.ask();
      const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 256);
      const __m512i low[2] = {_mm512_and_si512(left, nibble), _mm512_and_si512(right, nibble)};
      const __m512i high[2] = {_mm512_and_si512(_mm512_srli_epi16(left, 4), nibble),
                               _mm512_and_si512(_mm512_srli_epi16(right, 4), nibble)};
      repeat<R>(SKYLINE_EACH(r) {
        const __m512i x = spread_four(a + r * lda), y = spread_four(a + r * lda + 16);
        repeat<2>(SKYLINE_EACH(t) {
          __m512i(&second)[2] = two ? more[r] : sums[r];
          sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], low[t], x);
          second[t] = _mm512_dpbusd_epi32(second[t], high[t], y);
        });
      });
    }
  if constexpr (two)
    repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { sums[r][t] = _mm512_add_epi32(sums[r][t], more[r][t]); }); });
}

#if defined(__AMX_TILE__)

// Widens int4 blocks of 32 k to int8 tiles, -8 to 7, for steps of 32 or 64 k.
inline void widen_int4(const uint8_t* from, int64_t blocks, int64_t step_k, uint8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  const int64_t tile = step_k * kTile;
  for (int64_t block = 0; block < blocks; block++) {
    uint8_t* at = to + block * 32 / step_k * 2 * tile + block * 32 % step_k * kTile;
    for (int t = 0; t < 2; t++, at += tile)
      for (int part = 0; part < 4; part++, from += 64) {
        prefetch_l2(from + kAhead);
        const __m512i bytes = _mm512_loadu_si512(from);
        const __m512i low = _mm512_and_si512(bytes, nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
        _mm512_storeu_si512(at + 64 * part, _mm512_sub_epi8(low, eight));
        _mm512_storeu_si512(at + 64 * part + 256, _mm512_sub_epi8(high, eight));
      }
  }
}

#endif

}  // namespace skyline
