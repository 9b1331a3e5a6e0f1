// The inner kernels of all matrix products: rows of A times one panel of 32 packed columns, accumulated in float32 or int32.
//
// Each output element is one chain of additions along K, in order, whatever the number of rows: that is what makes results
// independent of the batch. The three instruction sets order the additions inside a step of K differently, so their
// results may differ from each other.
#pragma once

#include <cstring>

#include "amx.h"
#include "packed.h"
#include "repeat.h"
#include "simd.h"

namespace skyline {

// How far ahead weights are asked for from memory. The hardware's own prefetching stops while a block is being widened or
// multiplied by many rows; asking ahead keeps memory busy meanwhile. Panels lie one after the other, so running over the end
// of one is right, and asking for memory that is not there does nothing.
constexpr int64_t kAhead = 8192;

// Asks for a line of weights. Into the first-level cache: memory is then read up to a quarter faster than by way of the second
// (Zen 5; with AVX2 it is all the same there). With AMX, for which this has not been measured, into the second, as tiles take
// much of the first.
inline void ask_for(const uint8_t* line) {
#if defined(__AMX_TILE__)
  prefetch_l2(line);
#else
  prefetch_l1(line);
#endif
}

// E2M1 (OCP Microscaling Formats 1.0, section 5.3.3) as bfloat16.
constexpr uint16_t kE2m1Bits[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0,
                                    0x8000, 0xBF00, 0xBF80, 0xBFC0, 0xC000, 0xC040, 0xC080, 0xC0C0};

constexpr int kFloatRows = Vec::width == 16 ? 12 : 6;  // of A at once, by two vectors of columns

// Memory that is asked for while something else is being computed, a line or two with each few instructions: first [next, end),
// then [then, last).
struct Ahead {
  const uint8_t *next = nullptr, *end = nullptr, *then = nullptr, *last = nullptr;
  bool shared = false;  // several blocks of rows go by meanwhile, each of which asks for its part
  __attribute__((always_inline)) void ask() {
    if (next >= end) {
      if (then >= last) return;
      next = then;
      end = last;
      then = last;
    }
    ask_for(next);
    next += 64;
  }
  // With what multiplies two lines. Blocks that share the asking have time for one each: two would be a burst, and then a pause, and
  // memory gives a quarter less. Inlined by force: a call here costs int8 a twentieth.
  __attribute__((always_inline)) void ask_for_two() {
    ask();
    if (!shared) ask();
  }
  Ahead part(int64_t i, int64_t parts) const {
    const int64_t size = end - next;
    return {next + size * i / parts, next + size * (i + 1) / parts, nullptr, nullptr, true};
  }
};

template <int lines>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 32
  for (int i = 0; i < lines; i++) ask_for(from + kAhead + 64 * i);
}

// float32: the panel is [k][32].
template <int R = kFloatRows>
void multiply_float(const float* a, int64_t lda, int64_t rows, const float* b, int64_t k, float* c, bool accumulate) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_float<R - 1>(a, lda, rows, b, k, c, accumulate);
  }
  for (int64_t from = 0; from < kPanel; from += 2 * Vec::width) {
    Vec acc[R][2];
    repeat<R>(SKYLINE_EACH(r) {
      repeat<2>(SKYLINE_EACH(t) {
        acc[r][t] = accumulate ? Vec::load(c + r * kPanel + from + t * Vec::width) : Vec::zero();
      });
    });
    for (int64_t i = 0; i < k; i++) {
      const float* columns = b + i * kPanel + from;
      const Vec left = Vec::load(columns), right = Vec::load(columns + Vec::width);
      repeat<R>(SKYLINE_EACH(r) {
        const Vec x = Vec::all(a[r * lda + i]);
        acc[r][0] = fma(x, left, acc[r][0]);
        acc[r][1] = fma(x, right, acc[r][1]);
      });
    }
    repeat<R>(SKYLINE_EACH(r) {
      repeat<2>(SKYLINE_EACH(t) { acc[r][t].store(c + r * kPanel + from + t * Vec::width); });
    });
  }
}

}  // namespace skyline

#if defined(__AVX512F__)
#include "tiles_avx512.h"
#else
#include "tiles_avx2.h"
#endif
