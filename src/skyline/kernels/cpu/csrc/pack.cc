// Writing weights into their packed layout, quantizing on the way, and reading single rows back.
#include <cmath>
#include <vector>

#include "compressed.h"
#include "packed.h"
#include "packed_arguments.h"
#include "stored_rows.h"
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// One row of a weight, in float32.
void widen(const TensorView& t, int64_t row, int64_t k, float* out) {
  if (is_bf16(t)) {
    const bf16* from = rows_of<bf16>(t)[row];
    for (int64_t i = 0; i < k; i++) out[i] = to_float(from[i]);
  } else if (is_float32(t)) {
    std::copy_n(rows_of<float>(t)[row], k, out);
  } else {
    const uint16_t* from = rows_of<uint16_t>(t)[row];
    for (int64_t i = 0; i < k; i++) out[i] = half_to_float(from[i]);
  }
}

float largest(const float* values, int64_t n) {
  Vec best = Vec::zero();
  for (int64_t i = 0; i < n; i += Vec::width) best = max(best, abs(Vec::load(values + i, static_cast<int>(n - i))));
  return best.max();
}

bool finite(const float* values, int64_t n) {
  Vec sum = Vec::zero();  // x * 0 is 0 for every number, and NaN for what is none
  for (int64_t i = 0; i < n; i += Vec::width)
    sum = fma(Vec::load(values + i, static_cast<int>(n - i)), Vec::zero(), sum);
  return sum.sum() == 0.0f;
}

enum class By { kProduct, kQuotient };

// q = round(x * factor) or round(x / factor), plus `add`, limited to [low, high]. A factor of 0 gives `add`.
template <By by>
void quantize(const float* x, int64_t n, float factor, float low, float high, float add, int8_t* q) {
  alignas(64) float part[Vec::width];
  for (int64_t i = 0; i < n; i += Vec::width) {
    int count = static_cast<int>(std::min<int64_t>(Vec::width, n - i));
    Vec v = Vec::load(x + i, count);
    v = factor == 0 ? Vec::zero() : by == By::kProduct ? v * Vec::all(factor) : v / Vec::all(factor);
    v = round_even(v) + Vec::all(add);
    max(Vec::all(low), min(v, Vec::all(high))).store(part);
    for (int j = 0; j < count; j++) q[i + j] = static_cast<int8_t>(part[j]);
  }
}

// Eight numbers of each of eight rows become eight lines of `to`, kTile numbers apart, a row a column.
void transpose(const uint32_t* const* rows, int64_t first, uint32_t* to) {
  __m256 a[8], b[8];
  for (int r = 0; r < 8; r++) a[r] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[r] + first));
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xEE);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xEE);
  }
  for (int r = 0; r < 4; r++) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + r * kTile), _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (r + 4) * kTile), _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
  }
}

// Up to 16 consecutive lanes of one tile, being filled.
struct TileWriter {
  const PackedMatrix& m;
  uint8_t* panel;
  int64_t place;  // of the first row
  int tile() const { return static_cast<int>(place % kPanel / kTile); }
  int lane() const { return static_cast<int>(place % kTile); }

  template <class T>  // T: what one row has in one step of k: two bf16, two int8, four int8
  void spread(const std::vector<const T*>& rows, int64_t steps, int64_t steps_a_block) {
    T* base = reinterpret_cast<T*>(panel);
    auto line = [&](int64_t s) {
      return base + (s / steps_a_block * 2 + tile()) * steps_a_block * kTile + s % steps_a_block * kTile + lane();
    };
    int64_t s = 0;
    if constexpr (sizeof(T) == 4) {
      for (; rows.size() == kTile && s + 8 <= steps; s += 8) {  // blocks are whole eights
        transpose(rows.data(), s, line(s));
        transpose(rows.data() + 8, s, line(s) + 8);
      }
    }
    for (; s < steps; s++) {
      for (size_t r = 0; r < rows.size(); r++) line(s)[r] = rows[r][s];
    }
  }
};

// Scales, and zero points if any, of values that are quantized already: shaped as in skyline.ops.QuantizedWeight.
struct Given {
  TensorView scales;
  ffi::Optional<TensorView> zeros;
};

class Packer {
 public:
  explicit Packer(const PackedMatrix& matrix, const Given* quantized = nullptr)
      : m(matrix), given(quantized), padded(matrix.padded_k()) {
    wide.resize(m.k);
    bits.resize(kTile * padded);
    levels.resize(kTile * padded);
  }

  // Rows [first, first + count) of src become rows at `row` of the weight; they all lie in one tile.
  void pack(const TensorView& src, int64_t first, int64_t count, int64_t row) {
    int64_t place = m.place(row);
    TileWriter writer{m, m.data + place / kPanel * m.panel_bytes(), place};
    switch (m.format) {
      case Format::kFloat32: {
        float* panel = reinterpret_cast<float*>(writer.panel);
        for (int64_t r = 0; r < count; r++) {
          widen(src, first + r, m.k, wide.data());
          for (int64_t i = 0; i < m.k; i++) panel[i * kPanel + place % kPanel + r] = wide[i];
        }
        break;
      }
      case Format::kBfloat16: {
        std::vector<const uint32_t*> rows;
        for (const bf16* row : narrow(src, first, count)) rows.push_back(reinterpret_cast<const uint32_t*>(row));
        writer.spread(rows, padded / 2, 16);
        break;
      }
      case Format::kCompressed:
        Compressor(m, exceptions).write(narrow(src, first, count).data(), count, place);
        break;
      case Format::kInt8:
      case Format::kInt8WeightOnly: {
        std::vector<const uint32_t*> fours;
        std::vector<const uint16_t*> pairs;
        for (int64_t r = 0; r < count; r++) {
          int8_t* to = levels.data() + r * padded;
          if (given) {
            std::copy_n(rows_of<int8_t>(src)[first + r], m.k, to);
            m.scales[place + r] = data<float>(given->scales)[first + r];
          } else {
            load(src, first + r);
            float most = largest(wide.data(), m.k), inverse = 127.0f / most;
            if (!std::isfinite(inverse)) inverse = 0;
            quantize<By::kProduct>(wide.data(), m.k, inverse, -127, 127, 0, to);
            m.scales[place + r] = most / 127.0f;
          }
          int32_t sum = 0;
          for (int64_t i = 0; i < m.k; i++) sum += to[i];
          m.sums[place + r] = sum;
          fours.push_back(reinterpret_cast<const uint32_t*>(to));
          pairs.push_back(reinterpret_cast<const uint16_t*>(to));
        }
        if (m.format == Format::kInt8) {
          writer.spread(fours, padded / 4, 16);
        } else {
          writer.spread(pairs, padded / 2, 16);
        }
        break;
      }
      case Format::kFp4:
      case Format::kFp8:
      case Format::kBytes:
      case Format::kSixBits: break;  // have functions of their own
      case Format::kInt4:
        for (int64_t r = 0; r < count; r++) {
          if (!given) load(src, first + r);
          for (int64_t g = 0; g < padded / m.group; g++)
            pack_group(writer, place % kPanel + r, g, given ? rows_of<int8_t>(src)[first + r] : nullptr, first + r);
        }
    }
  }

  bool all_finite = true;
  std::vector<int64_t> exceptions;  // compressed: as Compressor lists them

 private:
  // Rows of src as bfloat16, with zeros up to `padded`.
  std::vector<const bf16*> narrow(const TensorView& src, int64_t first, int64_t count) {
    std::vector<const bf16*> rows;
    for (int64_t r = 0; r < count; r++) {
      bf16* to = bits.data() + r * padded;
      if (is_bf16(src) && m.k == padded) {
        rows.push_back(rows_of<bf16>(src)[first + r]);
        continue;
      }
      if (is_bf16(src)) {
        std::copy_n(rows_of<bf16>(src)[first + r], m.k, to);
      } else {
        widen(src, first + r, m.k, wide.data());
        for (int64_t i = 0; i < m.k; i++) to[i] = to_bf16(wide[i]);
      }
      rows.push_back(to);
    }
    return rows;
  }
  void load(const TensorView& src, int64_t row) {
    widen(src, row, m.k, wide.data());
    all_finite = all_finite && finite(wide.data(), m.k);
  }

  // One row's group of k: see quantization/ for the formulas.
  void pack_group(const TileWriter& writer, int64_t column, int64_t g, const int8_t* ready, int64_t row) {
    int64_t begin = g * m.group, count = std::min(m.group, m.k - begin);
    const float* x = wide.data() + begin;
    uint8_t* group = writer.panel + g * m.group_bytes();
    uint16_t* scales = reinterpret_cast<uint16_t*>(group);
    int8_t* q = levels.data();
    std::fill_n(q, m.group, int8_t{8});
    if (ready) {
      const int64_t at = row * (padded / m.group) + g;
      scales[column] = data<uint16_t>(given->scales)[at];
      if (m.zeros) scales[kPanel + column] = float_to_half(half_to_float(data<uint16_t>(*given->zeros)[at]) - 8);
      for (int64_t i = 0; i < count; i++) q[i] = static_cast<int8_t>(ready[begin + i] + (m.zeros ? 0 : 8));
    } else if (m.zeros) {
      float low = 0, high = 0;
      for (int64_t i = 0; i < count; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
      scales[column] = float_to_half((high - low) / 15);
      float scale = half_to_float(scales[column]);
      float zero = scale == 0 ? 0 : std::nearbyint(-low / scale);
      scales[kPanel + column] = float_to_half(zero - 8);
      quantize<By::kQuotient>(x, count, scale, 0, 15, zero, q);
    } else {
      float most = 0;
      for (int64_t i = 0; i < count; i++)
        if (std::fabs(x[i]) > std::fabs(most)) most = x[i];
      scales[column] = float_to_half(most / -8);
      quantize<By::kQuotient>(x, count, half_to_float(scales[column]), -8, 7, 0, q);
      for (int64_t i = 0; i < count; i++) q[i] = static_cast<int8_t>(q[i] + 8);
    }
    uint8_t* bytes = group + (m.zeros ? 128 : 64) + column / kTile * 256 + column % kTile * 4;
    for (int64_t block = 0; block < m.group / 32; block++, bytes += 512, q += 32)
      for (int i = 0; i < 16; i++) bytes[i / 4 * 64 + i % 4] = static_cast<uint8_t>(q[i] | q[16 + i] << 4);
  }

  const PackedMatrix& m;
  const Given* given;
  int64_t padded;
  std::vector<float> wide;
  std::vector<uint16_t> bits;
  std::vector<int8_t> levels;
};

// Value (row, i) of the weight as the kernels use it.
float element(const PackedMatrix& m, int64_t place, int64_t i) {
  const uint8_t* panel = m.panel(place / kPanel);
  int64_t tile = place % kPanel / kTile, lane = place % kTile;
  switch (m.format) {
    case Format::kFloat32: return reinterpret_cast<const float*>(panel)[i * kPanel + place % kPanel];
    case Format::kBfloat16:
      return to_float(reinterpret_cast<const bf16*>(panel)[((i / 32 * 2 + tile) * 16 + i % 32 / 2) * 32 + lane * 2 + i % 2]);
    case Format::kInt8WeightOnly: return m.scales[place] * static_cast<int8_t>(panel[int8_place(place, i)]);
    case Format::kInt8:
      return m.scales[place] *
             reinterpret_cast<const int8_t*>(panel)[((i / 64 * 2 + tile) * 16 + i % 64 / 4) * 64 + lane * 4 + i % 4];
    case Format::kFp4: {
      const int64_t line = m.fp4_scale_bytes() + i / 32 * 512 + tile * 256 + i % 32 / 8 * 64, n = i % 8 / 2;
      const uint8_t byte = panel[line + (2 * lane + i % 2) * 2 + n / 2];
      const float value = kE2m1[n % 2 ? byte >> 4 : byte & 15];
      return m.scales[place] * (value * fp4_scale(m, panel[i / m.group * kPanel + place % kPanel]));
    }
    case Format::kFp8: {
      const float value = e4m3(*fp8_value(m, place, i));
      return value * (m.group ? reinterpret_cast<const float*>(panel)[i / m.group * kPanel + place % kPanel] : m.scales[place]);
    }
    case Format::kBytes:
    case Format::kSixBits: return byte_element(m, panel, place, i);
    case Format::kCompressed:  // is read by rows
    case Format::kInt4: break;
  }
  const uint8_t* group = panel + i / m.group * m.group_bytes();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group);
  const int64_t four = i % 16 / 4, in_block = i % m.group / 32 * 512 + tile * 256;
  const uint8_t byte = group[(m.zeros ? 128 : 64) + in_block + four * 64 + lane * 4 + i % 4];
  const int level = i % 32 < 16 ? byte & 15 : byte >> 4;
  float zero = m.zeros ? half_to_float(scales[kPanel + place % kPanel]) : 0;
  return (level - 8 - zero) * half_to_float(scales[place % kPanel]);
}

// Formats that have functions of their own below.
bool stored_only(Format format) {
  return format == Format::kFp4 || format == Format::kFp8 || format == Format::kBytes || format == Format::kSixBits;
}

// Goes through the rows tile by tile.
void pack_all(Packer& packer, const PackedMatrix& m, const TensorView& src, int64_t first_row) {
  const int64_t rows = src.shape()[0], half = m.n / 2;
  for (int64_t done = 0; done < rows;) {
    int64_t row = first_row + done;
    int64_t in_tile = kTile - m.place(row) % kTile;
    int64_t until_up = m.gated && row < half ? half - row : rows;  // the halves need not begin with a tile
    int64_t count = std::min({in_tile, until_up, rows - done});
    packer.pack(src, done, count, row);
    done += count;
  }
}

void check_rows(const PackedMatrix& m, const TensorView& src, int64_t first_row) {
  SKYLINE_CHECK(src.ndim() == 2 && src.shape()[1] == m.k && first_row >= 0 && first_row + src.shape()[0] <= m.n,
                "rows of another shape than the weight's");
  SKYLINE_CHECK(is_bf16(src) || is_float32(src) || (src.dtype().code == kDLFloat && src.dtype().bits == 16),
                "takes float32, bfloat16 or float16");
}

}  // namespace

// Writes src [rows, K], of float32, bfloat16 or float16, to the rows of the weight from first_row on. Returns whether all
// values were finite (always true for formats that take any value). Any number of threads may write different rows.
bool pack_rows(PACKED_PARAMETERS, TensorView src, int64_t first_row) {
  PackedMatrix m = PACKED_MATRIX;
  check_rows(m, src, first_row);
  SKYLINE_CHECK(!stored_only(m.format) && m.format != Format::kCompressed, "is not made of rows of floats here");
  Packer packer(m);
  pack_all(packer, m, src, first_row);
  return packer.all_finite;
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_rows, pack_rows);

// Writes src [rows, K], as `pack_rows` takes it, to a compressed weight. Returns how many exceptions there are; found int64 gets
// them, as Compressor lists them, if it is long enough.
int64_t pack_compressed(PACKED_PARAMETERS, TensorView src, int64_t first_row, TensorView found) {
  PackedMatrix m = PACKED_MATRIX;
  check_rows(m, src, first_row);
  SKYLINE_CHECK(m.format == Format::kCompressed && is_int64(found) && found.IsContiguous(), "takes a compressed weight");
  Packer packer(m);
  pack_all(packer, m, src, first_row);
  const int64_t count = static_cast<int64_t>(packer.exceptions.size());
  if (count <= found.numel()) std::copy(packer.exceptions.begin(), packer.exceptions.end(), data<int64_t>(found));
  return count;
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_compressed, pack_compressed);

// Writes rows that are quantized already to the weight from first_row on: values int8 [rows, K], scales and zeros as in
// skyline.ops.QuantizedWeight. Any number of threads may write different rows.
void pack_levels(PACKED_PARAMETERS, TensorView values, TensorView value_scales, ffi::Optional<TensorView> value_zeros,
                 int64_t first_row) {
  PackedMatrix m = PACKED_MATRIX;
  SKYLINE_CHECK(is_int8(values) && values.ndim() == 2 && values.shape()[1] == k && first_row >= 0 &&
                    first_row + values.shape()[0] <= n,
                "takes rows of int8 [N, K]");
  SKYLINE_CHECK(!stored_only(m.format) && m.format != Format::kCompressed, "takes integers by rows, or int4 in groups");
  int64_t count = values.shape()[0] * (m.format == Format::kInt4 ? m.padded_k() / group : 1);
  SKYLINE_CHECK(value_scales.numel() == count && value_scales.IsContiguous() && zeros == value_zeros.has_value() &&
                    (!zeros || ((*value_zeros).numel() == count && (*value_zeros).IsContiguous())),
                "scales or zero points do not match the weight");
  Given given{value_scales, value_zeros};
  Packer packer(m, &given);
  pack_all(packer, m, values, first_row);
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_levels, pack_levels);

// Writes rows of FP4 to the weight from first_row on: values uint8 [rows, K / 2], of each row's groups scales uint8 [rows,
// groups], and of each row row_scales float32 [rows]. Any number of threads may write different rows.
void pack_fp4(PACKED_PARAMETERS, TensorView values, TensorView group_scales, TensorView row_scales, int64_t first_row) {
  PackedMatrix m = PACKED_MATRIX;
  SKYLINE_CHECK(m.format == Format::kFp4 && (group == 16 || group == 32) && k % 2 == 0, "takes FP4 in groups of 16 or 32");
  const int64_t rows = row_scales.numel(), groups = ceil_div(k, group);
  SKYLINE_CHECK(is_uint8(values) && values.ndim() == 2 && values.shape()[0] == rows && values.shape()[1] == k / 2 &&
                    is_uint8(group_scales) && group_scales.numel() == rows * groups && is_float32(row_scales) &&
                    values.IsContiguous() && group_scales.IsContiguous() && row_scales.IsContiguous() && first_row >= 0 &&
                    first_row + rows <= n,
                "values or scales do not match the weight");
  for (int64_t r = 0; r < rows; r++) {
    const int64_t place = m.place(first_row + r);
    pack_fp4_row(m, data<uint8_t>(values) + r * (k / 2), data<uint8_t>(group_scales) + r * groups, place);
    m.scales[place] = data<float>(row_scales)[r];
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_fp4, pack_fp4);

// Writes rows of FP8 to the weight from first_row on: values uint8 [rows, K] and scales float32 [rows, groups], or [rows, 1]
// without groups. Returns whether all values were numbers. Any number of threads may write different rows.
bool pack_fp8(PACKED_PARAMETERS, TensorView values, TensorView row_scales, int64_t first_row) {
  PackedMatrix m = PACKED_MATRIX;
  SKYLINE_CHECK(m.format == Format::kFp8 && (group == 0 || group == 128), "takes FP8 in groups of 128, or by rows");
  const int64_t groups = group ? ceil_div(k, group) : 1;
  SKYLINE_CHECK(is_uint8(values) && values.ndim() == 2 && values.shape()[1] == k && is_float32(row_scales) &&
                    row_scales.numel() == values.shape()[0] * groups && values.IsContiguous() && row_scales.IsContiguous() &&
                    first_row >= 0 && first_row + values.shape()[0] <= n,
                "values or scales do not match the weight");
  bool numbers = true;
  for (int64_t r = 0; r < values.shape()[0]; r++)
    numbers &= pack_fp8_row(m, data<uint8_t>(values) + r * k, data<float>(row_scales) + r * groups, m.place(first_row + r));
  return numbers;
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_fp8, pack_fp8);

// Writes rows of bytes or six bits to the weight from first_row on: the parts of skyline.ops.quantized.ByteRows, whose scales and
// minima are for each `from_group` of a row. Any number of threads may write different rows.
void pack_bytes(PACKED_PARAMETERS, TensorView levels, int64_t from_group, TensorView factors, ffi::Optional<TensorView> offsets,
                ffi::Optional<TensorView> small_scales, ffi::Optional<TensorView> minima, int64_t first_row) {
  PackedMatrix m = PACKED_MATRIX;
  const bool six = m.format == Format::kSixBits;
  SKYLINE_CHECK((six ? !zeros && group == 16 : m.format == Format::kBytes && (group == 16 || group == 32)) &&
                    from_group % group == 0,
                "groups do not match");
  const auto halves = [](const TensorView& t) { return t.dtype().code == kDLFloat && t.dtype().bits == 16; };
  const int64_t rows = levels.shape()[0], heads = ceil_div(k, m.head_k()), groups = ceil_div(k, from_group);
  SKYLINE_CHECK(is_int8(levels) && levels.ndim() == 2 && levels.shape()[1] == k && levels.IsContiguous() && first_row >= 0 &&
                    first_row + rows <= n && halves(factors) && factors.numel() == rows * heads && factors.IsContiguous(),
                "levels or factors do not match the weight");
  SKYLINE_CHECK(group == 32 ? !small_scales.has_value() : (k % kSuper == 0 && small_scales.has_value() && is_int8(*small_scales) &&
                                (*small_scales).numel() == rows * groups && (*small_scales).IsContiguous()),
                "scales do not match the weight");
  SKYLINE_CHECK(!offsets.has_value() || (zeros && halves(*offsets) && (*offsets).numel() == rows * heads && (*offsets).IsContiguous()),
                "offsets do not match the weight");
  SKYLINE_CHECK(!minima.has_value() || (group == 16 && offsets.has_value() && is_uint8(*minima) &&
                                        (*minima).numel() == rows * groups && (*minima).IsContiguous()),
                "minima do not match the weight");
  for (int64_t r = 0; r < rows; r++) {
    const ByteRow row{data<int8_t>(levels) + r * k,
                      data<uint16_t>(factors) + r * heads,
                      offsets.has_value() ? data<uint16_t>(*offsets) + r * heads : nullptr,
                      group == 16 ? data<int8_t>(*small_scales) + r * groups : nullptr,
                      minima.has_value() ? data<uint8_t>(*minima) + r * groups : nullptr,
                      from_group};
    pack_bytes_row(m, row, m.place(first_row + r));
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_bytes, pack_bytes);

// out [T, K], ids [T] int64 or int32: the rows of the weight, dequantized. Ids outside the weight raise.
void packed_embedding(TensorView out, TensorView ids, PACKED_PARAMETERS) {
  PackedMatrix m = PACKED_MATRIX;
  SKYLINE_CHECK(is_int64(ids) || is_int32(ids), "takes ids of int64 or int32");
  int64_t count = ids.shape()[0];
  auto id = [&](int64_t t) { return is_int64(ids) ? data<int64_t>(ids)[t] : data<int32_t>(ids)[t]; };
  for (int64_t t = 0; t < count; t++) SKYLINE_CHECK(id(t) >= 0 && id(t) < n, "an id is outside the table");
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out);
    ThreadPool::get().run_ranges(count, 4, [&](int64_t begin, int64_t end) {
      std::vector<bf16> bits(m.format == Format::kCompressed ? m.k : 0);
      for (int64_t t = begin; t < end; t++) {
        int64_t place = m.place(id(t));
        if (m.format == Format::kCompressed) {
          read_compressed_row(m, place, bits.data());
          for (int64_t i = 0; i < m.k; i++) to[t][i] = from_float<T>(to_float(bits[i]));
        } else {
          for (int64_t i = 0; i < m.k; i++) to[t][i] = from_float<T>(element(m, place, i));
        }
      }
    });
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_embedding, packed_embedding);

}  // namespace skyline
