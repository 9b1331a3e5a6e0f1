// Converting and quantizing rows of A.
#include "activations.h"

#include <cstring>
#include <limits>

#include "product.h"
#include "threads.h"

namespace skyline {
namespace {

// Values of a row that share a scale once they are quantized.
int64_t shared(const PackedMatrix& m) { return m.format == Format::kInt4 ? m.group : m.padded_k(); }

#if !defined(__AVX512F__)
// Whole numbers in 16 bits, each four in the order 0 2 1 3: see tiles_avx2.h.
inline void store_in_pairs(Vec v, int16_t* to) {
  const __m256i whole = _mm256_cvtps_epi32(v.v);
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shufflehi_epi16(_mm_shufflelo_epi16(narrow, 0xD8), 0xD8));
}
#endif

// 127 / largest; of zeros, or as good as that, 0.
inline float inverse_scale(float largest) {
  const float inverse = 127.0f / largest;
  return inverse <= std::numeric_limits<float>::max() ? inverse : 0;
}

// Symmetric to the largest magnitude, rounded to even; returns the scale. Q: int8_t, or Quantized.
template <class T, class Q>
float quantize(const T* x, int64_t k, int64_t padded, Q* q) {
  Vec best = Vec::zero(), poison = Vec::zero();  // 0 times what is no number is NaN, which a maximum would lose
  for (int64_t i = 0; i < k; i += Vec::width) {
    Vec v = Vec::load(x + i, static_cast<int>(k - i));
    best = max(best, abs(v));
    poison = fma(v, Vec::zero(), poison);
  }
  const float most = best.max(), inverse = inverse_scale(most);
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

struct Group {
  float scale;
  int32_t sum;  // of its integers
};

// The same of a group that is all there, with the vectors in registers.
template <int64_t part, class T>
Group quantize_group(const T* x, int8_t* q) {
  constexpr int n = part / Vec::width;
  Vec v[n], best = Vec::zero(), poison = Vec::zero();
  for (int i = 0; i < n; i++) {
    v[i] = Vec::load(x + i * Vec::width);
    best = max(best, abs(v[i]));
    poison = fma(v[i], Vec::zero(), poison);
  }
  const float most = best.max(), inverse = inverse_scale(most);
  Vec total = Vec::zero();  // whole numbers
  for (int i = 0; i < n; i++) {
    const Vec level = round_even(v[i] * Vec::all(inverse));
    level.store(q + i * Vec::width, Vec::width);
    total = total + level;
  }
  const float nothing = poison.sum();  // or NaN
  return {most / 127.0f + nothing, nothing == 0 ? static_cast<int32_t>(total.sum()) : 0};
}

template <class T>
Group quantize_group(const T* x, int64_t count, int64_t part, int8_t* q) {
  if (count == part && part == 32) return quantize_group<32>(x, q);
  if (count == part && part == 64) return quantize_group<64>(x, q);
  if (count == part && part == 128) return quantize_group<128>(x, q);
  Group group{quantize(x, count, part, q), 0};
  for (int64_t i = 0; i < part; i++) group.sum += q[i];
  return group;
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
        const Group group = quantize_group(x + r * stride + i * part, std::min(part, m.k - i * part), part, to);
        scales[i * rows + r] = group.scale;
        sums[i * rows + r] = group.sum;
      }
    }
  });
  return {scratch, wide, scales, sums, rows};
}

template int64_t prepared_bytes<float>(const PackedMatrix&, int64_t, int64_t);
template int64_t prepared_bytes<bf16>(const PackedMatrix&, int64_t, int64_t);
template Activations prepare<float>(const PackedMatrix&, const float*, int64_t, int64_t, uint8_t*);
template Activations prepare<bf16>(const PackedMatrix&, const bf16*, int64_t, int64_t, uint8_t*);

}  // namespace skyline
