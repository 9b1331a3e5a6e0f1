#include "product.h"

#include <cstring>

#include "threads.h"
#include "tiles.h"

namespace skyline {
namespace {

constexpr int64_t kMostRows = 512;
constexpr int64_t kPiece = 512;                 // columns of A that are gone through before the next block of rows
constexpr int64_t kCacheBytes = 1 << 20;        // of A, to stay in a core's second-level cache

struct alignas(64) Scratch {
  float c[kMostRows * kPanel];
  float partial[kRowBlock * kPanel];
  uint8_t b[kPiece * kPanel * 2];
};

Scratch& scratch() {
  thread_local Scratch* mine = new Scratch;  // as long as the thread; threads live as long as the process
  return *mine;
}

int64_t activation_bytes(Format format) { return format == Format::kFloat32 ? 4 : format == Format::kInt8 ? 1 : 2; }

// c [rows][32] += partial * scale (- zero * scale * sum of the group's activations), with scales and zeros of the group.
void add_group(const PackedMatrix& m, const uint8_t* group, const float* partial, const float* sums, int64_t sums_stride,
               int64_t rows, float* c) {
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(group);
  for (int64_t i = 0; i < kPanel; i += Vec::width) {
#if defined(__AVX512F__)
    auto widen = [](const uint16_t* p) { return Vec{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; };
#else
    auto widen = [](const uint16_t* p) { return Vec{_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; };
#endif
    Vec scale = widen(halves + i);
    if (!m.zeros) {
      for (int64_t r = 0; r < rows; r++)
        fma(Vec::load(partial + r * kPanel + i), scale, Vec::load(c + r * kPanel + i)).store(c + r * kPanel + i);
      continue;
    }
    Vec offset = Vec::zero() - scale * widen(halves + kPanel + i);
    for (int64_t r = 0; r < rows; r++) {
      Vec sum = fma(Vec::load(partial + r * kPanel + i), scale, Vec::load(c + r * kPanel + i));
      fma(Vec::all(sums[r * sums_stride]), offset, sum).store(c + r * kPanel + i);
    }
  }
}

// c [rows][32] for rows of A along the whole of K.
void accumulate(const PackedMatrix& m, const Activations& a, int64_t begin, int64_t rows, const uint8_t* panel, Scratch& s) {
  TileShape shape;
  const int64_t k = m.padded_k();
  if (m.format == Format::kFloat32) {
    const float* x = static_cast<const float*>(a.data) + begin * a.stride;
    for (int64_t k0 = 0; k0 < k; k0 += kPiece)
      for (int64_t r = 0; r < rows; r += 4)
        multiply_float(x + r * a.stride + k0, a.stride, std::min<int64_t>(4, rows - r),
                       reinterpret_cast<const float*>(panel) + k0 * kPanel, std::min(kPiece, k - k0), s.c + r * kPanel, k0 > 0);
    return;
  }
  if (m.format == Format::kInt8) {
    const int8_t* x = static_cast<const int8_t*>(a.data) + begin * a.stride;
    int32_t* c = reinterpret_cast<int32_t*>(s.c);
    const int64_t piece = rows <= kRowBlock ? k : 2 * kPiece;
    for (int64_t k0 = 0; k0 < k; k0 += piece)
      for (int64_t r = 0; r < rows; r += kRowBlock)
        multiply<Int8Step>(shape, x + r * a.stride + k0, a.stride, std::min(kRowBlock, rows - r), panel + k0 * kPanel,
                           std::min(piece, k - k0) / 64, c + r * kPanel, k0 > 0, rows <= kRowBlock);
    return;
  }
  const bf16* x = static_cast<const bf16*>(a.data) + begin * a.stride;
  if (m.format == Format::kInt4) {
    std::memset(s.c, 0, rows * kPanel * sizeof(float));
    const int64_t head = m.zeros ? 128 : 64, group_bytes = m.group_bytes(), wide_bytes = m.group * kPanel * 2;
    const int64_t groups = k / m.group, at_once = kPiece / m.group;
    for (int64_t g0 = 0; g0 < groups; g0 += at_once) {
      const int64_t count = std::min(at_once, groups - g0);
      for (int64_t g = 0; g < count; g++)
        widen_int4(panel + (g0 + g) * group_bytes + head, m.group / 32, s.b + g * wide_bytes);
      for (int64_t r = 0; r < rows; r += kRowBlock) {
        const int64_t block = std::min(kRowBlock, rows - r);
        for (int64_t g = 0; g < count; g++) {
          multiply<Bf16Step>(shape, x + r * a.stride + (g0 + g) * m.group, a.stride, block, s.b + g * wide_bytes, m.group / 32,
                             s.partial, false);
          const float* sums = m.zeros ? a.group_sums + (begin + r) * groups + g0 + g : nullptr;
          add_group(m, panel + (g0 + g) * group_bytes, s.partial, sums, groups, block, s.c + r * kPanel);
        }
      }
    }
    return;
  }
  const bool direct = m.format == Format::kBfloat16;
  const int64_t piece = direct && rows <= kRowBlock ? k : kPiece;
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

// Symmetric to the row's largest magnitude, rounded to even; returns the scale.
template <class T>
float quantize_row(const T* x, int64_t k, int64_t padded, int8_t* q) {
  Vec best = Vec::zero(), poison = Vec::zero();  // 0 times what is no number is NaN, which a maximum would lose
  for (int64_t i = 0; i < k; i += Vec::width) {
    Vec v = Vec::load(x + i, static_cast<int>(k - i));
    best = max(best, abs(v));
    poison = fma(v, Vec::zero(), poison);
  }
  const float most = best.max(), inverse = most == 0 ? 0 : 127.0f / most;
  for (int64_t i = 0; i < k; i += Vec::width) {
    const int count = static_cast<int>(std::min<int64_t>(Vec::width, k - i));
    Vec v = Vec::load(x + i, count) * Vec::all(inverse);
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>(count == 16 ? 0xFFFF : (1u << count) - 1);
    _mm512_mask_cvtsepi32_storeu_epi8(q + i, mask, _mm512_cvtps_epi32(v.v));
#else
    alignas(32) int32_t whole[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole), _mm256_cvtps_epi32(v.v));
    for (int j = 0; j < count; j++) q[i + j] = static_cast<int8_t>(std::clamp(whole[j], -127, 127));
#endif
  }
  std::memset(q + k, 0, padded - k);
  return most / 127.0f + poison.sum();
}

template <class T>
void convert_row(const T* x, int64_t k, int64_t padded, bf16* to) {
  for (int64_t i = 0; i < k; i += Vec::width) {
    const int count = static_cast<int>(std::min<int64_t>(Vec::width, k - i));
    Vec::load(x + i, count).store(to + i, count);
  }
  std::memset(to + k, 0, (padded - k) * 2);
}

template <class T>
bool usable_as_is(const PackedMatrix& m) {
  if (m.format == Format::kFloat32) return sizeof(T) == 4;
  return sizeof(T) == 2 && m.format != Format::kInt8 && m.k % m.k_step() == 0;
}

// Rows are kept off power-of-two strides, at which their lines would compete for the same places in the cache.
int64_t scratch_stride(const PackedMatrix& m) { return m.padded_k() + 64; }

}  // namespace

int64_t max_rows(const PackedMatrix& m) {
  int64_t fit = kCacheBytes / (m.padded_k() * activation_bytes(m.format)) / kRowBlock * kRowBlock;
  return std::clamp<int64_t>(fit, 4 * kRowBlock, kMostRows / kRowBlock * kRowBlock);
}

template <class T>
int64_t prepared_bytes(const PackedMatrix& m, int64_t rows, int64_t stride) {
  int64_t sums = m.format == Format::kInt4 && m.zeros ? rows * (m.padded_k() / m.group) * 4 : 0;
  int64_t scales = m.format == Format::kInt8 ? rows * 4 : 0;
  int64_t converted = usable_as_is<T>(m) ? 0 : rows * scratch_stride(m) * activation_bytes(m.format);
  return ceil_div(converted, 64) * 64 + sums + scales;
}

template <class T>
Activations prepare(const PackedMatrix& m, const T* x, int64_t stride, int64_t rows, uint8_t* scratch) {
  Activations a{x, stride, nullptr, nullptr};
  uint8_t* extra = scratch;
  const int64_t padded = m.padded_k(), wide = scratch_stride(m);
  const int64_t grain = 1 + 16384 / (m.k + 1);
  if (!usable_as_is<T>(m)) {
    extra += ceil_div(rows * wide * activation_bytes(m.format), 64) * 64;
    a.data = scratch;
    a.stride = wide;
    float* scales = reinterpret_cast<float*>(extra);
    if (m.format == Format::kInt8) {
      a.scales = scales;
      extra += rows * 4;
    }
    ThreadPool::get().run_ranges(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        if (m.format == Format::kInt8) {
          scales[r] = quantize_row(x + r * stride, m.k, padded, reinterpret_cast<int8_t*>(scratch) + r * wide);
        } else {
          convert_row(x + r * stride, m.k, padded, reinterpret_cast<bf16*>(scratch) + r * wide);
        }
      }
    });
  }
  if (m.format == Format::kInt4 && m.zeros) {
    float* sums = reinterpret_cast<float*>(extra);
    a.group_sums = sums;
    const int64_t groups = padded / m.group;
    ThreadPool::get().run_ranges(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++)
        for (int64_t g = 0; g < groups; g++) {
          Vec sum = Vec::zero();
          for (int64_t i = g * m.group; i < std::min((g + 1) * m.group, m.k); i += Vec::width)
            sum = sum + Vec::load(x + r * stride + i, static_cast<int>(std::min((g + 1) * m.group, m.k) - i));
          sums[r * groups + g] = sum.sum();
        }
    });
  }
  return a;
}

template <class T>
void compute_panel(const Product<T>& product, int64_t begin, int64_t end, int64_t panel) {
  Scratch& s = scratch();
  accumulate(product.weight, product.a, begin, end - begin, product.weight.panel(panel), s);
  finish(product, begin, end - begin, panel, s);
}

template int64_t prepared_bytes<float>(const PackedMatrix&, int64_t, int64_t);
template int64_t prepared_bytes<bf16>(const PackedMatrix&, int64_t, int64_t);
template Activations prepare<float>(const PackedMatrix&, const float*, int64_t, int64_t, uint8_t*);
template Activations prepare<bf16>(const PackedMatrix&, const bf16*, int64_t, int64_t, uint8_t*);
template void compute_panel<float>(const Product<float>&, int64_t, int64_t, int64_t);
template void compute_panel<bf16>(const Product<bf16>&, int64_t, int64_t, int64_t);

}  // namespace skyline
