#include "product.h"

#include <unistd.h>

#include <cstring>
#include <limits>

#include "threads.h"
#include "tiles.h"

namespace skyline {
namespace {

constexpr int64_t kMostRows = 512, kMostPiece = 512;  // of any tactic
constexpr int64_t kGroups = 4;                        // of int4, multiplied before their sums are added up

struct alignas(64) Scratch {
  float c[kMostRows * kPanel];
#if defined(__AVX512F__)
  int32_t partial[kGroups * kRowBlock * kPanel];
  uint8_t b[kMostPiece * kPanel * 2];
#else
  uint8_t wide[kMostPiece * kPanel * 2];
#endif
};

Scratch& scratch() {
  thread_local Scratch* mine = new Scratch;  // as long as the thread; threads live as long as the process
  return *mine;
}

// Bytes of A that stay in a core's second-level cache while panels go by: half of it.
int64_t cache_bytes() {
  static const int64_t half = [] {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where the system does not know
    return std::clamp<int64_t>(size > 0 ? size : 1 << 20, 1 << 18, 1 << 21) / 2;
  }();
  return half;
}

bool quantizes(Format format) { return format == Format::kInt8 || format == Format::kInt4; }  // activations, to int8

#if defined(__AVX512F__)
using Narrow = bf16;    // rows of A for weights of bfloat16 or int8 weight-only
using Quantized = int8_t;  // and for int8
#else
using Narrow = float;
using Quantized = int16_t;
#endif

int64_t activation_bytes(Format format) {
  switch (format) {
    case Format::kFloat32: return sizeof(float);
    case Format::kInt8: return sizeof(Quantized);
    case Format::kInt4: return sizeof(int8_t);
    default: return sizeof(Narrow);
  }
}

// Values of a row that share a scale once they are quantized.
int64_t shared(const PackedMatrix& m) { return m.format == Format::kInt4 ? m.group : m.padded_k(); }

#if defined(__AVX512F__)
Vec widen_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
Vec difference(const int32_t* p, int32_t x) {
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(x)))};
}
#else
Vec widen_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
Vec difference(const int32_t* p, int32_t x) {
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(from, _mm256_set1_epi32(x)))};
}
#endif

#if defined(__AVX512F__)

// c [R][32] += (partial - zero * sum) * scale of x * scale of the weight, for the groups [g, g + count) in order; x of the
// rows from `row` on. partial: [count][kRowBlock][32]. `levels`: partial is of levels 0 to 15, not of -8 to 7.
template <int R, bool levels>
void add_groups(const PackedMatrix& m, const Activations& a, int64_t row, const uint8_t* panel, int64_t g, int64_t count,
                const int32_t* partial, float* c) {
  for (int64_t i = 0; i < kPanel; i += Vec::width) {
    Vec sum[R];
    for (int r = 0; r < R; r++) sum[r] = Vec::load(c + r * kPanel + i);
    for (int64_t at = g; at < g + count; at++) {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel + at * m.group_bytes()) + i;
      const float* scales = a.scales + at * a.rows + row;
      const int32_t *sums = a.sums + at * a.rows + row, *from = partial + (at - g) * kRowBlock * kPanel + i;
      const Vec scale = widen_half(halves), zero = m.zeros ? Vec::zero() - widen_half(halves + kPanel) : Vec::zero();
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        Vec value = difference(from + r * kPanel, levels ? 8 * sums[r] : 0);
        if (m.zeros) value = fma(Vec::all(static_cast<float>(sums[r])), zero, value);
        sum[r] = fma(value * Vec::all(scales[r]), scale, sum[r]);
      }
    }
    for (int r = 0; r < R; r++) sum[r].store(c + r * kPanel + i);
  }
}

// c [rows][32] += up to R rows of A, from `row` on and at x, times an int4 panel, along the whole of K.
template <int R = 4>
void multiply_few(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows,
                  const uint8_t* panel, Scratch& s, float* c) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_few<R - 1>(m, a, x, row, rows, panel, s, c);
  }
  const int64_t head = m.zeros ? 128 : 64, group_bytes = m.group_bytes(), groups = m.padded_k() / m.group;
  for (int64_t g = 0; g < groups; g++) {
    multiply_levels<R>(x + g * m.group, a.stride, panel + g * group_bytes + head, m.group / 32, s.partial);
    add_groups<R, true>(m, a, row, panel, g, 1, s.partial, c);
  }
}

void accumulate_int4(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                     const Tactic& tactic, Scratch& s) {
  std::memset(s.c, 0, rows * kPanel * sizeof(float));
  const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
#if defined(__AMX_TILE__)
  const bool in_tiles = rows > tactic.level_rows;
#else
  const bool in_tiles = false;
#endif
  if (!in_tiles) {
    for (int64_t r = 0; r < rows; r += 4)
      multiply_few(m, a, x + r * a.stride, begin + r, std::min<int64_t>(4, rows - r), panel, s, s.c + r * kPanel);
    return;
  }
#if defined(__AMX_TILE__)
  TileShape shape;
  const int64_t head = m.zeros ? 128 : 64, group_bytes = m.group_bytes(), groups = m.padded_k() / m.group;
  const int64_t at_once = tactic.piece / m.group, wide_bytes = m.group * kPanel;
  for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
    const int64_t end = std::min(g0 + at_once, groups);
    for (int64_t g = g0; g < end; g++)
      widen_int4(panel + g * group_bytes + head, m.group / 32, std::min<int64_t>(m.group, 64), s.b + (g - g0) * wide_bytes);
    for (int64_t r = 0; r < rows; r += kRowBlock) {
      const int64_t block = std::min(kRowBlock, rows - r);
      for (int64_t g = g0; g < end; g += kGroups) {
        const int64_t count = std::min(kGroups, end - g);
        for (int64_t i = 0; i < count; i++) {
          const int8_t* from = x + r * a.stride + (g + i) * m.group;
          const uint8_t* b = s.b + (g + i - g0) * wide_bytes;
          int32_t* to = s.partial + i * kRowBlock * kPanel;
          if (m.group == 32) {
            multiply<Int8HalfStep>(shape, from, a.stride, block, b, 1, to, false);
          } else {
            multiply<Int8Step>(shape, from, a.stride, block, b, m.group / 64, to, false);
          }
        }
        tile_fence();
        int64_t done = 0;
        for (; done + 8 <= block; done += 8)
          add_groups<8, false>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
        for (; done < block; done++)
          add_groups<1, false>(m, a, begin + r + done, panel, g, count, s.partial + done * kPanel, s.c + (r + done) * kPanel);
      }
    }
  }
#endif
}

void accumulate_packed(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                       const Tactic& tactic, Scratch& s) {
  TileShape shape;
  const int64_t k = m.padded_k();
  if (m.format == Format::kInt8) {
    const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
    int32_t* c = reinterpret_cast<int32_t*>(s.c);
    const int64_t piece = rows <= kRowBlock ? k : 2 * tactic.piece;
    for (int64_t k0 = 0; k0 < k; k0 += piece)
      for (int64_t r = 0; r < rows; r += kRowBlock)
        multiply<Int8Step>(shape, x + r * a.stride + k0, a.stride, std::min(kRowBlock, rows - r), panel + k0 * kPanel,
                           std::min(piece, k - k0) / 64, c + r * kPanel, k0 > 0, rows <= kRowBlock);
    return;
  }
  if (m.format == Format::kInt4) return accumulate_int4(m, a, begin, rows, panel, tactic, s);
  const bf16* x = static_cast<const bf16*>(a.data) + begin * a.stride;
  const bool direct = m.format == Format::kBfloat16;
  const int64_t piece = direct && rows <= kRowBlock ? k : tactic.piece;
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const int64_t steps = std::min(piece, k - k0) / 32;
    const uint8_t* b = panel + k0 * kPanel * 2;
    if (!direct) {
      widen_int8(panel + k0 * kPanel, steps, s.b);
      b = s.b;
    }
    for (int64_t r = 0; r < rows; r += kRowBlock)
      multiply<Bf16Step>(shape, x + r * a.stride + k0, a.stride, std::min(kRowBlock, rows - r), b, steps, s.c + r * kPanel,
                         k0 > 0, direct && rows <= kRowBlock);
  }
}

#else  // AVX2

// c [rows][32] = rows of A times a panel. A piece of it stays in the first-level cache while blocks of rows go by, widened if
// those are many, and the next one is asked for meanwhile: it lies behind.
template <class Panel, class A, class C>
void accumulate_columns(const A* x, int64_t stride, int64_t rows, const uint8_t* panel, int64_t k, int64_t piece, Scratch& s, C* c) {
  const bool wide = rows > 8;
  const int64_t blocks = ceil_div(rows, wide ? kWideRows : kRowBlock);
  for (int64_t k0 = 0; k0 < k; k0 += piece) {
    const uint8_t* b = panel + k0 / Panel::k * Panel::bytes;
    const int64_t steps = std::min(piece, k - k0) / Panel::k, bytes = steps * Panel::bytes;
    const Ahead ahead{b + bytes, b + 2 * bytes};
    if (wide) widen<Panel>(b, steps, s.wide);
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t r = rows * i / blocks, count = rows * (i + 1) / blocks - r;
      const A* from = x + r * stride + k0;
      C* to = c + r * kPanel;
      if (!wide) {
        multiply<Panel>(from, stride, count, b, steps, to, k0 > 0, ahead.part(i, blocks));
      } else {
        multiply_widened<Panel>(from, stride, count, s.wide, steps, to, k0 > 0, ahead.part(i, blocks));
      }
    }
  }
}

// c [R][32] += R rows of A, from `row` on and at x, times the groups [g, end) of an int4 panel, in order.
template <bool zeros, int R = static_cast<int>(kRowBlock)>
void add_groups(const PackedMatrix& m, const Activations& a, const int8_t* x, int64_t row, int64_t rows, const uint8_t* panel,
                int64_t g, int64_t end, float* c) {
  if constexpr (R > 1) {
    if (rows < R) return add_groups<zeros, R - 1>(m, a, x, row, rows, panel, g, end, c);
  }
  const int64_t group = m.group, group_bytes = m.group_bytes(), stride = a.stride;
  for (; g < end; g++) {
    const uint8_t* from = panel + g * group_bytes;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
    const float* scales = a.scales + g * a.rows + row;
    float totals[R], offsets[R];
    for (int r = 0; r < R; r++) {
      totals[r] = static_cast<float>(a.sums[g * a.rows + row + r]);
      offsets[r] = -8 * totals[r];
    }
    for (int vec = 0; vec < 4; vec++) {
      __m256i sums[R];
      multiply_levels<R>(x + g * group, stride, from + (zeros ? 128 : 64), vec, group / 32, sums);
      const Vec scale = widen_half(halves + 8 * vec);
      const Vec zero = zeros ? Vec::zero() - widen_half(halves + kPanel + 8 * vec) : Vec::zero();
      repeat<R>(SKYLINE_EACH(r) {
        Vec value = Vec{_mm256_cvtepi32_ps(sums[r])} + Vec::all(offsets[r]);  // exact: whole numbers below 2^24
        if (zeros) value = fma(Vec::all(totals[r]), zero, value);
        float* to = c + r * kPanel + 8 * vec;
        fma(value * Vec::all(scales[r]), scale, Vec::load(to)).store(to);
      });
    }
  }
}

void accumulate_packed(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                       const Tactic& tactic, Scratch& s) {
  const int64_t k = m.padded_k();
  if (m.format == Format::kInt4) {
    std::memset(s.c, 0, rows * kPanel * sizeof(float));
    const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
    const int64_t groups = k / m.group, at_once = 2 * tactic.piece / m.group, blocks = ceil_div(rows, kRowBlock);
    for (int64_t g = 0; g < groups; g += at_once)
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t r = rows * i / blocks, count = rows * (i + 1) / blocks - r;
        const int64_t end = std::min(g + at_once, groups);
        if (m.zeros) {
          add_groups<true>(m, a, x + r * a.stride, begin + r, count, panel, g, end, s.c + r * kPanel);
        } else {
          add_groups<false>(m, a, x + r * a.stride, begin + r, count, panel, g, end, s.c + r * kPanel);
        }
      }
  } else if (m.format == Format::kInt8) {
    const int16_t* x = static_cast<const int16_t*>(a.data) + begin * a.stride;
    accumulate_columns<Int8Fours>(x, a.stride, rows, panel, k, tactic.piece / 2, s, reinterpret_cast<int32_t*>(s.c));
  } else {
    const float* x = static_cast<const float*>(a.data) + begin * a.stride;
    if (m.format == Format::kBfloat16) {
      accumulate_columns<Bf16Pairs>(x, a.stride, rows, panel, k, tactic.piece / 4, s, s.c);
    } else {
      accumulate_columns<Int8Pairs>(x, a.stride, rows, panel, k, tactic.piece / 4, s, s.c);
    }
  }
}

#endif

// The same for float32, where a panel needs no widening.
void accumulate_float(const float* x, int64_t stride, int64_t rows, const float* panel, int64_t k, int64_t piece, float* c) {
#if defined(__AVX512F__)
  const int64_t whole = 0;
#else
  const int64_t whole = k / 32 * 32, blocks = ceil_div(rows, kWideRows);
  for (int64_t k0 = 0; k0 < whole; k0 += piece / 4) {
    const uint8_t* b = reinterpret_cast<const uint8_t*>(panel + k0 * kPanel);
    const int64_t steps = std::min(piece / 4, whole - k0) / 32, bytes = steps * 32 * kPanel * 4;
    const Ahead ahead{b + bytes, b + 2 * bytes};
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t r = rows * i / blocks;
      multiply_widened<Bf16Pairs>(x + r * stride + k0, stride, rows * (i + 1) / blocks - r, b, steps, c + r * kPanel, k0 > 0,
                                  ahead.part(i, blocks));
    }
  }
#endif
  for (int64_t k0 = whole; k0 < k; k0 += piece)
    for (int64_t r = 0; r < rows; r += kFloatRows)
      multiply_float(x + r * stride + k0, stride, std::min<int64_t>(kFloatRows, rows - r), panel + k0 * kPanel,
                     std::min(piece, k - k0), c + r * kPanel, k0 > 0);
}

// c [rows][32] for rows of A along the whole of K.
void accumulate(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel,
                const Tactic& tactic, Scratch& s) {
  if (m.format != Format::kFloat32) return accumulate_packed(m, a, begin, rows, panel, tactic, s);
  const float* x = static_cast<const float*>(a.data) + begin * a.stride;
  accumulate_float(x, a.stride, rows, reinterpret_cast<const float*>(panel), m.k, tactic.piece, s.c);
}

// One vector of finished columns of a row: scaled, with bias, still in float32.
template <class T>
Vec finished(const Product<T>& p, const Scratch& s, int64_t row, int64_t r, int64_t column, int64_t place, int64_t feature,
             int count) {
  const PackedMatrix& m = p.weight;
  Vec value;
  if (m.format == Format::kInt8) {
    alignas(64) float wide[Vec::width];
    const int32_t* sums = reinterpret_cast<const int32_t*>(s.c) + r * kPanel + column;
    for (int i = 0; i < Vec::width; i++) {
      int32_t sum = sums[i];
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
      sum -= 128 * m.sums[place + i];
#endif
      wide[i] = static_cast<float>(sum);
    }
    value = Vec::load(wide) * (Vec::all(p.a.scales[row]) * Vec::load(m.scales + place));
  } else {
    value = Vec::load(s.c + r * kPanel + column);
    if (m.format == Format::kInt8WeightOnly) value = value * Vec::load(m.scales + place);
  }
  return p.bias ? value + Vec::load(p.bias + feature, count) : value;
}

template <class T>
void finish(const Product<T>& p, int64_t begin, int64_t rows, int64_t panel, const Scratch& s) {
  const PackedMatrix& m = p.weight;
  const int64_t first = panel * kPanel;
  if (m.gated) {
    const int64_t half = m.n / 2, feature = panel * kTile, columns = std::min(kTile, half - feature);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < columns; i += Vec::width) {
        const int count = static_cast<int>(std::min<int64_t>(Vec::width, columns - i));
        Vec gate = finished(p, s, begin + r, r, i, first + i, feature + i, count);
        Vec up = finished(p, s, begin + r, r, kTile + i, first + kTile + i, half + feature + i, count);
        (silu(gate) * up).store(p.out + (begin + r) * p.out_stride + feature + i, count);
      }
    return;
  }
  const int64_t columns = std::min(kPanel, m.n - first);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i += Vec::width) {
      const int count = static_cast<int>(std::min<int64_t>(Vec::width, columns - i));
      finished(p, s, begin + r, r, i, first + i, first + i, count).store(p.out + (begin + r) * p.out_stride + first + i, count);
    }
}

// Symmetric to the largest magnitude, rounded to even; returns the scale.
template <class T, class Q>
float quantize(const T* x, int64_t k, int64_t padded, Q* q) {
  Vec best = Vec::zero(), poison = Vec::zero();  // 0 times what is no number is NaN, which a maximum would lose
  for (int64_t i = 0; i < k; i += Vec::width) {
    Vec v = Vec::load(x + i, static_cast<int>(k - i));
    best = max(best, abs(v));
    poison = fma(v, Vec::zero(), poison);
  }
  const float most = best.max();
  float inverse = 127.0f / most;
  if (!(inverse <= std::numeric_limits<float>::max())) inverse = 0;  // of zeros, or as good as that
  for (int64_t i = 0; i < k; i += Vec::width) {
    const int count = static_cast<int>(std::min<int64_t>(Vec::width, k - i));
    Vec v = Vec::load(x + i, count) * Vec::all(inverse);
    if constexpr (sizeof(Q) == 1) {
      v.store(q + i, count);
    } else {
      store_in_pairs(v, q + i);
    }
  }
  const int64_t written = sizeof(Q) == 1 ? k : ceil_div(k, 8) * 8;
  std::memset(q + written, 0, (padded - written) * sizeof(Q));
  return most / 127.0f + poison.sum();
}

template <class T>
void convert_row(const T* x, int64_t k, int64_t padded, Narrow* to) {
  for (int64_t i = 0; i < k; i += Vec::width) {
    const int count = static_cast<int>(std::min<int64_t>(Vec::width, k - i));
    Vec::load(x + i, count).store(to + i, count);
  }
  std::memset(to + k, 0, (padded - k) * sizeof(Narrow));
}

template <class T>
bool usable_as_is(const PackedMatrix& m) {
  if (m.format == Format::kFloat32) return sizeof(T) == 4;
  return std::is_same_v<T, Narrow> && !quantizes(m.format) && m.k % m.k_step() == 0;
}

// Rows are kept off power-of-two strides, at which their lines would compete for the same places in the cache.
int64_t scratch_stride(const PackedMatrix& m) { return m.padded_k() + 64; }

}  // namespace

int64_t max_rows(const PackedMatrix& m, const Tactic& tactic) {
  int64_t fit = cache_bytes() / (m.padded_k() * activation_bytes(m.format)) / kRowBlock * kRowBlock;
  return std::clamp<int64_t>(fit, 4 * kRowBlock, tactic.rows / kRowBlock * kRowBlock);
}

template <class T>
int64_t prepared_bytes(const PackedMatrix& m, int64_t rows, int64_t stride) {
  int64_t scales = quantizes(m.format) ? 2 * rows * (m.padded_k() / std::max<int64_t>(shared(m), 1)) * 4 : 0;  // and sums
  int64_t converted = usable_as_is<T>(m) ? 0 : rows * scratch_stride(m) * activation_bytes(m.format);
  return ceil_div(converted, 64) * 64 + scales;
}

template <class T>
Activations prepare(const PackedMatrix& m, const T* x, int64_t stride, int64_t rows, uint8_t* scratch) {
  if (usable_as_is<T>(m)) return {x, stride, nullptr, nullptr, rows};
  const int64_t padded = m.padded_k(), wide = scratch_stride(m), part = shared(m), parts = part ? padded / part : 0;
  float* scales = reinterpret_cast<float*>(scratch + ceil_div(rows * wide * activation_bytes(m.format), 64) * 64);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + rows * parts);
  ThreadPool::get().run_ranges(rows, 1 + 16384 / (m.k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      if (!quantizes(m.format)) {
        convert_row(x + r * stride, m.k, padded, reinterpret_cast<Narrow*>(scratch) + r * wide);
        continue;
      }
      if (m.format == Format::kInt8) {
        scales[r] = quantize(x + r * stride, m.k, padded, reinterpret_cast<Quantized*>(scratch) + r * wide);
        continue;
      }
      for (int64_t i = 0; i < parts; i++) {
        int8_t* to = reinterpret_cast<int8_t*>(scratch) + r * wide + i * part;
        scales[i * rows + r] = quantize(x + r * stride + i * part, std::min(part, m.k - i * part), part, to);
        int32_t sum = 0;
        for (int64_t j = 0; j < part; j++) sum += to[j];
        sums[i * rows + r] = sum;
      }
    }
  });
  return {scratch, wide, scales, sums, rows};
}

template <class T>
void compute_panel(const Product<T>& product, int64_t begin, int64_t end, int64_t panel) {
  Scratch& s = scratch();
  accumulate(product.weight, product.a, begin, end - begin, product.weight.panel(panel), product.tactic, s);
  finish(product, begin, end - begin, panel, s);
}

template int64_t prepared_bytes<float>(const PackedMatrix&, int64_t, int64_t);
template int64_t prepared_bytes<bf16>(const PackedMatrix&, int64_t, int64_t);
template Activations prepare<float>(const PackedMatrix&, const float*, int64_t, int64_t, uint8_t*);
template Activations prepare<bf16>(const PackedMatrix&, const bf16*, int64_t, int64_t, uint8_t*);
template void compute_panel<float>(const Product<float>&, int64_t, int64_t, int64_t);
template void compute_panel<bf16>(const Product<bf16>&, int64_t, int64_t, int64_t);

}  // namespace skyline
