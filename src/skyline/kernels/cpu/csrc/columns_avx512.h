// Panels of small numbers as the bfloat16 they stand for, with AVX-512: written out for many rows, or multiplied by few in passing.
#pragma once

#include "byte_numbers.h"
#include "compressed.h"
#include "tiles.h"

namespace skyline {

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
  static constexpr int64_t kHeadK = head_k(group), kHeadBytes = head_bytes(group, offsets), kStep = step_bytes(six);
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

// Writes the block that `begin` was called for in the bfloat16 layout.
template <class Columns>
inline void widen_block(Columns& columns, uint8_t* to) {
  repeat<4>(SKYLINE_EACH(q) {
    __m512i pairs[2][4];  // all of them before any is stored: what two have in common is computed once
    repeat<2>(SKYLINE_EACH(t) {
      if constexpr (requires { columns.template pairs<t, 0>(q, pairs[t][0], pairs[t][1]); }) {
        repeat<2>(SKYLINE_EACH(h) { columns.template pairs<t, h>(q, pairs[t][2 * h], pairs[t][2 * h + 1]); });
      } else {
        repeat<4>(SKYLINE_EACH(n) { pairs[t][n] = columns.template pair<t, n>(q); });
      }
    });
    repeat<2>(SKYLINE_EACH(t) {
      repeat<4>(SKYLINE_EACH(n) { _mm512_storeu_si512(to + 1024 * t + 64 * (4 * q + n), pairs[t][n]); });
    });
  });
  if constexpr (requires { columns.put_right(to); }) columns.put_right(to);
}

// The same of `blocks` blocks of 32 k.
template <class Columns>
inline void widen(Columns columns, int64_t blocks, uint8_t* to) {
  for (int64_t i = 0; i < blocks; i++, to += 2048) {
    columns.begin();
    widen_block(columns, to);
  }
}

constexpr int64_t kPassingRows = 8;  // up to so many are multiplied by columns as they are made

#if !defined(__AMX_TILE__)

// c [rows][32] (+)= rows of A, at most R, times `blocks` blocks, in the order of `multiply`, and, if there are scales of the
// columns, times those. keep: the blocks are also written to `lines` in the bfloat16 layout, for other rows. ahead: what is asked for
// meanwhile, if the columns do not ask for anything themselves.
template <class Columns, int R = static_cast<int>(kPassingRows), bool keep = false>
void multiply_in_passing(const bf16* a, int64_t lda, int64_t rows, const Columns& given, int64_t blocks, float* c, bool accumulate,
                         const float* scales = nullptr, uint8_t* lines = nullptr, Ahead ahead = {}) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_in_passing<Columns, R - 1, keep>(a, lda, rows, given, blocks, c, accumulate, scales, lines, ahead);
  }
  Columns columns = given;
  __m512 acc[R][2];
  const bool go_on = accumulate && !scales;
  repeat<R>(SKYLINE_EACH(r) {
    repeat<2>(SKYLINE_EACH(t) { acc[r][t] = go_on ? _mm512_loadu_ps(c + r * kPanel + 16 * t) : _mm512_setzero_ps(); });
  });
  const auto add = [&](const bf16* x, __m512i left, __m512i right) __attribute__((always_inline)) {
    repeat<R>(SKYLINE_EACH(r) {
      const __m512i all = spread_four(x + r * lda);
      acc[r][0] = Bf16Step::dot(acc[r][0], all, left);
      acc[r][1] = Bf16Step::dot(acc[r][1], all, right);
    });
  };
  for (int64_t i = 0; i < blocks; i++) {
    columns.begin();
    if constexpr (requires { columns.irregular(); }) {
      if (columns.irregular()) [[unlikely]] {
        alignas(64) uint8_t here[2048];
        uint8_t* block = keep ? lines : here;
        widen_block(columns, block);
        for (int p = 0; p < 16; p++, a += 2) add(a, _mm512_loadu_si512(block + 64 * p), _mm512_loadu_si512(block + 1024 + 64 * p));
        if (keep) lines += 2048;
        continue;
      }
    }
    for (int q = 0; q < 4; q++, a += 8) {
      if constexpr (requires(__m512i v) { columns.template pairs<0, 0>(q, v, v); }) {
        repeat<2>(SKYLINE_EACH(h) {
          if constexpr (!Columns::kAsks) ahead.ask(), ahead.ask();
          __m512i left[2], right[2];
          columns.template pairs<0, h>(q, left[0], left[1]);
          columns.template pairs<1, h>(q, right[0], right[1]);
          repeat<2>(SKYLINE_EACH(n) {
            if constexpr (keep) {
              _mm512_storeu_si512(lines + 64 * (2 * h + n), left[n]);
              _mm512_storeu_si512(lines + 64 * (2 * h + n) + 1024, right[n]);
            }
            add(a + 4 * h + 2 * n, left[n], right[n]);
          });
        });
      } else {
        repeat<4>(SKYLINE_EACH(n) { add(a + 2 * n, columns.template pair<0, n>(q), columns.template pair<1, n>(q)); });
      }
      if (keep) lines += 256;
    }
    if (keep) lines += 1024;
  }
  if (scales) return add_scaled<R>(acc, scales, c, accumulate);
  repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { _mm512_storeu_ps(c + r * kPanel + 16 * t, acc[r][t]); }); });
}

#endif

}  // namespace skyline
