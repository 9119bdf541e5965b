// multi_horizon_loss in CUDA C++, frame-major: losses and gradients in one pass, made in the forward.
//
// count_kernel    With segments only: what each term (a horizon's loss or a pair's) is a mean over.
// patch_kernel    A block has a tile of frame m of one clip. It makes the frame's pyramid in registers, meets in it the
//                 predictions of frame m made at m - k_i, and writes their gradients, those of the pairs included.
// gather_kernel   The same for factors other than 1, 2, 4 and 8: a thread gathers what one element needs.
// finish_kernel   Adds the blocks' sums in order. Nothing is read on the host.
// scale_kernel    The gradients times the upstream gradient, which it reads on the device; returns early at 1.
#include <algorithm>

#include "common.cuh"

namespace mfwm::cuda {
namespace {

constexpr int most_horizons = 16, most_pairs = most_horizons * (most_horizons - 1) / 2;
constexpr int threads = 128, warps = threads / 32;
constexpr size_t most_shared_bytes = 48 << 10;

// Frames [b, t, c, y, x] as images, or cut into tokens with features in (row, column, channel) order.
struct Frames {
  void* data;
  DType dtype;
  int patch, shift;  // 0: images; log2 where patch is a power of 2, else -1
  bool vectors;      // what a lane holds of a row lies together and aligned
  int64_t batch, time, channel, row, column;
  int64_t patch_row, patch_column;

  __device__ int token_of(int place) const { return shift >= 0 ? place >> shift : place / patch; }
  __device__ int64_t row_offset(int y) const {
    if (!patch) return y * row;
    const int token = token_of(y);
    return token * patch_row + (y - token * patch) * row;
  }
  __device__ int64_t column_offset(int x) const {
    if (!patch) return x * column;
    const int token = token_of(x);
    return token * patch_column + (x - token * patch) * column;
  }
  __device__ int64_t offset(int64_t b, int64_t t, int c, int y, int x) const {
    return b * batch + t * time + c * channel + row_offset(y) + column_offset(x);
  }
};

struct Horizon {
  Frames pred, gradient;  // gradient.data is null where it is not wanted
  int64_t offset;
  int factor, height, width;
  int level;  // factor = 2^level in patch_kernel
  int slot;   // where the slopes of its pairs are kept for it; -1: nowhere
};

struct Pair {
  uint8_t near, far;
};

struct Numbers {  // fp32 or fp64
  const void* data;
  DType dtype;
  int64_t step[2];
  __device__ float at(int i, int j) const { return load<float>(data, dtype, i * step[0] + j * step[1]); }
};

struct Parameters {
  Horizon horizons[most_horizons];
  Pair pairs[most_pairs];        // by the far side's level, so that the near side is averaged step by step
  uint8_t order[most_horizons];  // by level, then as given: a pair's near side comes before its far side
  int count, pair_count, slots;
  Frames video;
  Array segment_ids;
  Numbers weights, pair_weights;
  int64_t batch, frames, positions, first_moment, moments;
  int channels, height, width, cells_y, cells_x, tiles;
  unsigned programs;
  bool channels_fastest, residual, near_learns, far_learns;
  LossKind kind;
  float scale, shift, delta, eps;
  const int64_t* term_counts;  // null: every position that has a frame counts
  float* partial;              // [terms, blocks]
};
static_assert(sizeof(Parameters) <= 4096, "what a kernel takes");

// ---- What both kernels share

__device__ __forceinline__ float to_float(uint8_t value) { return value; }
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16(value); }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half(value); }

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// The loss of `d`; d becomes its derivative.
template <LossKind kind>
__device__ __forceinline__ float loss_of(float& d, float delta, float eps) {
  const float given = d, size = fabsf(d);
  if constexpr (kind == LossKind::mse) {
    d = 2 * given;
    return given * given;
  } else if constexpr (kind == LossKind::l1) {
    d = given > 0 ? 1.f : given < 0 ? -1.f : given;  // 0, or NaN
    return size;
  } else if constexpr (kind == LossKind::huber) {
    d = given > delta ? delta : given < -delta ? -delta : given;
    return size > delta ? delta * (size - 0.5f * delta) : 0.5f * given * given;
  } else {
    const float root = sqrtf(given * given + eps * eps);
    d = given / root;
    return root;
  }
}

// The sum of the losses of the elements of `d` in `summed`; the first `count` of d become derivatives.
template <LossKind kind, int size>
__device__ __forceinline__ float losses_of(float (&d)[size], int count, unsigned summed, const Parameters& p) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < size; ++k) {
    if (k >= count) break;
    const float loss = loss_of<kind>(d[k], p.delta, p.eps);
    if (summed >> k & 1) sum += loss;
  }
  return sum;
}

template <int size>
__device__ __forceinline__ float losses_and_slopes(float (&d)[size], int count, unsigned summed, const Parameters& p) {
  switch (p.kind) {
    case LossKind::mse: return losses_of<LossKind::mse>(d, count, summed, p);
    case LossKind::l1: return losses_of<LossKind::l1>(d, count, summed, p);
    case LossKind::huber: return losses_of<LossKind::huber>(d, count, summed, p);
    default: return losses_of<LossKind::charbonnier>(d, count, summed, p);
  }
}

__device__ __forceinline__ int64_t segment_at(const Array& segments, int64_t b, int64_t t) {
  const int64_t at = b * segments.stride[0] + t * segments.stride[1];
  return segments.dtype == DType::int32 ? static_cast<const int32_t*>(segments.data)[at]
                                        : static_cast<const int64_t*>(segments.data)[at];
}

// The far side of a pair stands at n, its near side `apart` later; a horizon is a pair with itself.
struct Span {
  int far;
  int64_t apart, elements;
};

__device__ __forceinline__ Span span_of(const Parameters& p, int term) {
  const Pair pair = term < p.count ? Pair{static_cast<uint8_t>(term), static_cast<uint8_t>(term)} : p.pairs[term - p.count];
  const Horizon& far = p.horizons[pair.far];
  return {pair.far, far.offset - p.horizons[pair.near].offset, int64_t(p.channels) * far.height * far.width};
}

__device__ __forceinline__ int64_t count_of(const Parameters& p, int term) {
  if (p.term_counts) return p.term_counts[term];
  const Span span = span_of(p, term);
  const int64_t inside = min(p.positions - span.apart, p.frames - p.horizons[span.far].offset);
  return inside > 0 ? p.batch * inside * span.elements : 0;
}

__device__ __forceinline__ float inverse_count(const Parameters& p, int term) {
  const int64_t count = count_of(p, term);
  return count > 0 ? 1.f / static_cast<float>(count) : 0.f;
}

__device__ __forceinline__ float weight_of(const Parameters& p, int term) {
  if (term < p.count) return p.weights.at(term, 0);
  const Pair pair = p.pairs[term - p.count];
  return p.pair_weights.at(pair.near, pair.far);
}

// What a block keeps in shared memory: the terms' coefficients in the gradient, and columns of each thread's own (the
// sums of the terms, then the slots), which need no barrier.
struct Kept {
  float* coefficients;
  float* column;

  __device__ explicit Kept(const Parameters& p) : coefficients(dynamic_shared<float>()) {
    const int terms = p.count + p.pair_count;
    column = coefficients + terms + threadIdx.x;
    for (int term = threadIdx.x; term < terms; term += threads)
      coefficients[term] = weight_of(p, term) * inverse_count(p, term);
    for (int k = 0; k < terms + p.slots; ++k) column[k * threads] = 0;
    __syncthreads();
  }
  __device__ float& sum(int term) { return column[term * threads]; }

  __device__ void write_sums(const Parameters& p) {
    const int lane = threadIdx.x % 32, terms = p.count + p.pair_count;
    __syncthreads();
    for (int term = threadIdx.x / 32; term < terms; term += warps) {
      float sum = 0;
      for (int k = lane; k < threads; k += 32) sum += coefficients[terms + term * threads + k];
      sum = warp_sum(sum);
      if (lane == 0) p.partial[int64_t(term) * gridDim.x + blockIdx.x] = sum;
    }
  }
};

// A tile of frame m of clip b, and a bit per horizon: it has a position that predicts m (active), and it counts.
struct Meeting {
  int64_t b, m;
  int tile;
  unsigned active = 0, counted = 0;

  __device__ Meeting(const Parameters& p, unsigned program) {
    tile = static_cast<int>(program % static_cast<unsigned>(p.tiles));
    const unsigned moment = program / static_cast<unsigned>(p.tiles), moments = static_cast<unsigned>(p.moments);
    b = moment / moments;
    m = p.first_moment + moment % moments;
    for (int i = 0; i < p.count; ++i) {
      const int64_t n = m - p.horizons[i].offset;
      if (n < 0 || n >= p.positions) continue;
      active |= 1u << i;
      if (m < p.frames && (p.segment_ids.rank < 0 || segment_at(p.segment_ids, b, n) == segment_at(p.segment_ids, b, m)))
        counted |= 1u << i;
    }
  }
  __device__ bool is_active(int i) const { return active >> i & 1; }
  __device__ bool counts(int i) const { return counted >> i & 1; }
};

// ---- patch_kernel. A cell is 8 x 8 pixels of a channel, and four lanes of a warp share it, two rows each:
//
//   level   factor   a lane holds    lanes that hold the same
//   0       1        2 rows of 8     1
//   1       2        4               1
//   2       4        2               2
//   3       8        1               4
//
// Averages stay inside a lane, or come from the lanes with the other rows. Lanes that hold the same compute the same,
// and the first of them speaks for all.

constexpr int cell = 8, held = 16, cells_of_block = threads / 4;

__host__ __device__ __forceinline__ int elements_at(int level) { return level == 0 ? held : cell >> level; }

// What a lane holds of a frame at a level: from row y and column x, a bit for each element that exists.
struct Region {
  int level, y, x;
  unsigned exists;
};

struct Place {
  int c, y, x;  // of its cell and rows, in pixels
  int quarter;  // of the cell
  bool exists;

  __device__ Place(const Parameters& p, int tile) {
    const int lane = threadIdx.x % 32, unit = tile * cells_of_block + static_cast<int>(threadIdx.x) / 32 * 8 + lane % 8;
    const int cells = p.cells_y * p.cells_x;
    c = p.channels_fastest ? unit % p.channels : unit / cells;
    const int at = p.channels_fastest ? unit / p.channels : unit % cells;
    quarter = lane / 8;
    y = at / p.cells_x * cell + 2 * quarter;
    x = at % p.cells_x * cell;
    exists = unit < cells * p.channels;
  }

  __device__ Region at(int level, int height, int width) const {
    Region region{level, y >> level, x >> level, 0};
    const int rows = height - region.y, columns = min(width - region.x, cell >> level);
    if (!exists || rows <= 0 || columns <= 0) return region;
    region.exists = (1u << columns) - 1;
    if (level == 0 && rows > 1) region.exists |= region.exists << cell;
    return region;
  }
  __device__ Region at(const Horizon& h) const { return at(h.level, h.height, h.width); }
  __device__ bool speaks(int level) const { return level < 2 || quarter % (1 << (level - 1)) == 0; }
};

// Averages of averages: what a lane holds at level `from` becomes what it holds at the coarser level `to`.
__device__ __forceinline__ void average(float (&v)[held], int from, int to) {
  if (from < 1 && to >= 1) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = 0.25f * (v[2 * k] + v[2 * k + 1] + v[cell + 2 * k] + v[cell + 2 * k + 1]);
  }
  if (from < 2 && to >= 2) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float pair = v[2 * k] + v[2 * k + 1];
      v[k] = 0.25f * (pair + __shfl_xor_sync(~0u, pair, 8));
    }
  }
  if (from < 3 && to >= 3) {
    const float pair = v[0] + v[1];
    v[0] = 0.25f * (pair + __shfl_xor_sync(~0u, pair, 16));
  }
}

// Each value as often as it has elements at the finer level `to`.
__device__ __forceinline__ void repeat(float (&v)[held], int from, int to) {
  if (from >= 3 && to < 3) v[1] = v[0];
  if (from >= 2 && to < 2) {
    v[3] = v[2] = v[1];
    v[1] = v[0];
  }
  if (from >= 1 && to < 1) {
#pragma unroll
    for (int k = cell - 1; k >= 0; --k) v[k] = v[cell + k] = v[k / 2];
  }
}

template <class T, int size>
struct alignas(size * sizeof(T) < 16 ? size * sizeof(T) : 16) Vector {
  T values[size];
};

template <class T, int size>
__device__ __forceinline__ void load_vector(float* to, const T* from) {
  const auto vector = *reinterpret_cast<const Vector<T, size>*>(from);
#pragma unroll
  for (int k = 0; k < size; ++k) to[k] = to_float(vector.values[k]);
}

template <class T, int size>
__device__ __forceinline__ void store_vector(const float* from, T* to) {
  Vector<T, size> vector;
#pragma unroll
  for (int k = 0; k < size; ++k) assign(vector.values[k], from[k]);
  *reinterpret_cast<Vector<T, size>*>(to) = vector;
}

// run(k, offset) for the elements of a row from column x on.
template <class Run>
__device__ __forceinline__ void walk(const Frames& frames, int x, int columns, const Run& run) {
  int64_t offset = frames.column_offset(x);
  int inside = frames.patch ? x - frames.token_of(x) * frames.patch : 0;
#pragma unroll
  for (int k = 0; k < cell; ++k) {
    if (k >= columns) break;
    run(k, offset);
    offset += frames.column;
    if (++inside == frames.patch) {
      inside = 0;
      offset += frames.patch_column - frames.patch * frames.column;
    }
  }
}

template <class T>
__device__ __forceinline__ void load_region(float (&v)[held], const Frames& frames, int64_t start, const Region& region) {
  const int columns = cell >> region.level;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row > 0 && region.level > 0) break;
    const unsigned exists = region.exists >> (cell * row), all = (1u << columns) - 1;
    const T* from = static_cast<const T*>(frames.data) + start + frames.row_offset(region.y + row);
    float* to = v + cell * row;
    if (frames.vectors && (exists & all) == all) {
      from += region.x;
      if (region.level == 0)
        load_vector<T, 8>(to, from);
      else if (region.level == 1)
        load_vector<T, 4>(to, from);
      else if (region.level == 2)
        load_vector<T, 2>(to, from);
      else
        load_vector<T, 1>(to, from);
    } else {
      walk(frames, region.x, columns, [&](int k, int64_t at) { to[k] = exists >> k & 1 ? to_float(from[at]) : 0.f; });
    }
  }
}

template <class T>
__device__ __forceinline__ void store_region(const float (&v)[held], const Frames& frames, int64_t start,
                                             const Region& region) {
  const int columns = cell >> region.level;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row > 0 && region.level > 0) break;
    const unsigned exists = region.exists >> (cell * row), all = (1u << columns) - 1;
    T* to = static_cast<T*>(frames.data) + start + frames.row_offset(region.y + row);
    const float* from = v + cell * row;
    if (frames.vectors && (exists & all) == all) {
      to += region.x;
      if (region.level == 0)
        store_vector<T, 8>(from, to);
      else if (region.level == 1)
        store_vector<T, 4>(from, to);
      else if (region.level == 2)
        store_vector<T, 2>(from, to);
      else
        store_vector<T, 1>(from, to);
    } else {
      walk(frames, region.x, columns, [&](int k, int64_t at) {
        if (exists >> k & 1) assign(to[at], from[k]);
      });
    }
  }
}

// The frame t at a level.
__device__ __forceinline__ void load_video(float (&v)[held], const Parameters& p, const Place& place, int64_t b,
                                           int64_t t, int level) {
  const Frames& video = p.video;
  const Region region = place.at(0, p.height, p.width);
  const int64_t start = b * video.batch + t * video.time + place.c * video.channel;
  switch (video.dtype) {
    case DType::uint8: load_region<uint8_t>(v, video, start, region); break;
    case DType::float32: load_region<float>(v, video, start, region); break;
    case DType::bfloat16: load_region<__nv_bfloat16>(v, video, start, region); break;
    default: load_region<__half>(v, video, start, region);
  }
#pragma unroll
  for (int k = 0; k < held; ++k) v[k] = v[k] * p.scale + p.shift;
  average(v, 0, level);
}

template <class T>
__device__ __forceinline__ void load_prediction(float (&v)[held], const Parameters& p, const Horizon& h,
                                                const Place& place, const Meeting& meeting) {
  const int64_t n = meeting.m - h.offset;
  load_region<T>(v, h.pred, meeting.b * h.pred.batch + n * h.pred.time + place.c * h.pred.channel, place.at(h));
  if (p.residual) {
    float current[held];
    load_video(current, p, place, meeting.b, n, h.level);
#pragma unroll
    for (int k = 0; k < held; ++k) v[k] += current[k];
  }
}

// What a gradient is stored in until the upstream gradient is known: fp16 would make it subnormal.
template <class T>
struct Stored {
  using type = T;
};
template <>
struct Stored<__half> {
  using type = float;
};

template <class T>
__global__ void __launch_bounds__(threads, 4) patch_kernel(const __grid_constant__ Parameters p) {
  Kept kept(p);
  const int terms = p.count + p.pair_count;
  for (unsigned program = blockIdx.x; program < p.programs; program += gridDim.x) {
    const Meeting meeting(p, program);
    const Place place(p, meeting.tile);
    float target[held];
    int target_level = 0;
    if (meeting.counted) load_video(target, p, place, meeting.b, meeting.m, 0);
    for (int at = 0; at < p.count; ++at) {
      const int i = p.order[at];
      const Horizon& h = p.horizons[i];
      if (!meeting.is_active(i)) continue;
      float gradient[held] = {}, prediction[held];
      int level = h.level;
      // Horizon i against the frame (q = -1), then the far sides of its pairs against horizon i.
      for (int q = -1; q < p.pair_count && meeting.counts(i); ++q) {
        if (q >= 0 && (p.pairs[q].near != i || !meeting.counts(p.pairs[q].far))) continue;
        const Horizon& far = p.horizons[q < 0 ? i : p.pairs[q].far];
        const int term = q < 0 ? i : p.count + q, elements = elements_at(far.level);
        float apart[held];
        load_prediction<T>(apart, p, far, place, meeting);
        if (q < 0) {
          average(target, target_level, h.level);
          target_level = h.level;
#pragma unroll
          for (int k = 0; k < held; ++k) prediction[k] = apart[k], apart[k] -= target[k];
        } else {
          average(prediction, level, far.level);
          level = far.level;
#pragma unroll
          for (int k = 0; k < held; ++k) apart[k] -= prediction[k];
        }
        const unsigned summed = place.speaks(far.level) ? place.at(far).exists : 0;
        kept.sum(term) += losses_and_slopes(apart, elements, summed, p);
        const float weight = kept.coefficients[term];
        if (far.slot >= 0) {
#pragma unroll
          for (int k = 0; k < held; ++k) {
            if (k >= elements) break;
            float& slot = kept.sum(terms + far.slot + k);
            if (q < 0) gradient[k] = slot;
            slot = q < 0 ? 0 : slot + weight * apart[k];
          }
        }
        if (q < 0) {
#pragma unroll
          for (int k = 0; k < held; ++k) gradient[k] += weight * apart[k];
        } else if (p.near_learns) {
          repeat(apart, far.level, h.level);
          const float share = weight / static_cast<float>(1 << 2 * (far.level - h.level));
#pragma unroll
          for (int k = 0; k < held; ++k) gradient[k] -= share * apart[k];
        }
      }
      const Frames& to = h.gradient;
      if (to.data && place.speaks(h.level))
        store_region<typename Stored<T>::type>(
            gradient, to, meeting.b * to.batch + (meeting.m - h.offset) * to.time + place.c * to.channel, place.at(h));
    }
  }
  kept.write_sums(p);
}

// ---- gather_kernel. Any factors: an element reads all that its loss and its gradient depend on.

// Mean over a box of values at(y, x), a row at a time.
template <class At>
__device__ __forceinline__ float mean_of_box(int y, int x, int size, const At& at) {
  float sum = 0;
  for (int dy = 0; dy < size; ++dy) {
    float row = 0;
    for (int dx = 0; dx < size; ++dx) row += at(y * size + dy, x * size + dx);
    sum += row;
  }
  return sum / (static_cast<float>(size) * static_cast<float>(size));
}

__device__ __forceinline__ float frame_at(const Parameters& p, int64_t b, int64_t t, int c, int y, int x, int factor) {
  return mean_of_box(y, x, factor, [&](int row, int column) {
    return load<float>(p.video.data, p.video.dtype, p.video.offset(b, t, c, row, column)) * p.scale + p.shift;
  });
}

__device__ __forceinline__ float prediction_at(const Parameters& p, const Horizon& h, const Meeting& meeting, int c, int y,
                                               int x) {
  const int64_t n = meeting.m - h.offset;
  const float made = load<float>(h.pred.data, h.pred.dtype, h.pred.offset(meeting.b, n, c, y, x));
  return p.residual ? made + frame_at(p, meeting.b, n, c, y, x, h.factor) : made;
}

__global__ void __launch_bounds__(threads, 4) gather_kernel(const __grid_constant__ Parameters p) {
  Kept kept(p);
  for (unsigned program = blockIdx.x; program < p.programs; program += gridDim.x) {
    const Meeting meeting(p, program);
    for (int i = 0; i < p.count; ++i) {
      const Horizon& h = p.horizons[i];
      if (!meeting.is_active(i)) continue;
      // No frame has 2^31 elements, the launcher sees to it; unsigned for the sums that go beyond.
      const unsigned elements = p.channels * h.height * h.width, share = (elements + p.tiles - 1) / p.tiles;
      const unsigned first = min(elements, meeting.tile * share), end = min(elements, first + share);
      for (unsigned e = first + threadIdx.x; e < end; e += threads) {
        const int row = e / h.width, x = e - row * h.width, c = row / h.height, y = row - c * h.height;
        float gradient = 0;
        if (meeting.counts(i)) {
          const float prediction = prediction_at(p, h, meeting, c, y, x);
          float d[1] = {prediction - frame_at(p, meeting.b, meeting.m, c, y, x, h.factor)};
          kept.sum(i) += losses_and_slopes(d, 1, 1, p);
          gradient = kept.coefficients[i] * d[0];
          for (int q = 0; q < p.pair_count; ++q) {
            const Pair pair = p.pairs[q];
            const bool is_far = pair.far == i, learns = is_far ? p.far_learns : p.near_learns;
            if ((!is_far && pair.near != i) || (!is_far && !learns)) continue;
            if (!meeting.counts(pair.near) || !meeting.counts(pair.far)) continue;
            const Horizon &near = p.horizons[pair.near], &far = p.horizons[pair.far];
            const int ratio = far.factor / near.factor, far_y = is_far ? y : y / ratio, far_x = is_far ? x : x / ratio;
            d[0] = is_far ? prediction : prediction_at(p, far, meeting, c, far_y, far_x);
            d[0] -= mean_of_box(far_y, far_x, ratio, [&](int row, int column) {
              return prediction_at(p, near, meeting, c, row, column);
            });
            const float loss = losses_and_slopes(d, 1, 1, p), weight = kept.coefficients[p.count + q];
            if (is_far) kept.sum(p.count + q) += loss;
            if (learns) gradient += is_far ? weight * d[0] : -weight * d[0] / (static_cast<float>(ratio) * ratio);
          }
        }
        if (h.gradient.data)
          store<float>(h.gradient.data, h.gradient.dtype,
                       h.gradient.offset(meeting.b, meeting.m - h.offset, c, y, x), gradient);
      }
    }
  }
  kept.write_sums(p);
}

// ---- Before and after

__global__ void __launch_bounds__(threads) count_kernel(const __grid_constant__ Parameters p, int64_t* counts) {
  int64_t* sums = dynamic_shared<int64_t>();
  const int term = static_cast<int>(blockIdx.x);
  const Span span = span_of(p, term);
  const int64_t ahead = p.horizons[span.far].offset;
  int64_t count = 0;
  for (int64_t row = threadIdx.x; row < p.batch * p.positions; row += threads) {
    const int64_t b = row / p.positions, n = row % p.positions;
    if (n + span.apart >= p.positions || n + ahead >= p.frames) continue;
    const int64_t target = segment_at(p.segment_ids, b, n + ahead);
    count += segment_at(p.segment_ids, b, n) == target && segment_at(p.segment_ids, b, n + span.apart) == target;
  }
  count = warp_sum(count);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < warps; ++warp) count += sums[warp];
  counts[term] = count * span.elements;
}

struct Results {
  float *total, *means, *agreement;
  int64_t *counts, *agreement_counts;
  int64_t agreement_size;
  bool agreement_by_pair;  // [K, K], not [K]
};

__global__ void __launch_bounds__(threads) finish_kernel(const __grid_constant__ Parameters p, const Results results,
                                                         int64_t blocks) {
  float* weighted = dynamic_shared<float>();
  const int lane = threadIdx.x % 32, terms = p.count + p.pair_count;
  for (int64_t k = threadIdx.x; k < results.agreement_size; k += threads)
    results.agreement[k] = 0, results.agreement_counts[k] = 0;
  __syncthreads();
  for (int term = threadIdx.x / 32; term < terms; term += warps) {
    float sum = 0;
#pragma unroll 8
    for (int64_t k = lane; k < blocks; k += 32) sum += p.partial[term * blocks + k];
    sum = warp_sum(sum);
    if (lane > 0) continue;
    const float mean = sum * inverse_count(p, term);
    weighted[term] = weight_of(p, term) * mean;
    if (term < p.count) {
      results.means[term] = mean;
      results.counts[term] = count_of(p, term);
    } else {
      const Pair pair = p.pairs[term - p.count];
      const int place = (results.agreement_by_pair ? pair.near * p.count : 0) + pair.far;
      results.agreement[place] = mean;
      results.agreement_counts[place] = count_of(p, term);
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0;
  for (int term = 0; term < terms; ++term) total += weighted[term];
  *results.total = total;
}

// ---- The upstream gradient

constexpr int most_scaled = most_horizons + 2, scaled_by_thread = 4;  // vectors of 16 bytes

struct Scaled {
  void* data;
  DType dtype;
  bool vectors;
  int64_t size, first_block;
};

struct Scaling {
  Scaled tensors[most_scaled];
  int count;
  const float* upstream;
};

template <class T>
__device__ __forceinline__ void scale_tensor(const Scaled& tensor, int64_t block, float factor) {
  constexpr int size = 16 / sizeof(T);
  T* data = static_cast<T*>(tensor.data);
#pragma unroll
  for (int step = 0; step < scaled_by_thread; ++step) {
    const int64_t first = ((block * scaled_by_thread + step) * threads + threadIdx.x) * size;
    if (tensor.vectors && first + size <= tensor.size) {
      float values[size];
      load_vector<T, size>(values, data + first);
#pragma unroll
      for (int k = 0; k < size; ++k) values[k] *= factor;
      store_vector<T, size>(values, data + first);
    } else {
      for (int64_t k = first; k < min(first + size, tensor.size); ++k) assign(data[k], to_float(data[k]) * factor);
    }
  }
}

__global__ void __launch_bounds__(threads) scale_kernel(const __grid_constant__ Scaling p) {
  const float factor = *p.upstream;
  if (factor == 1) return;
  int t = 0;
  while (t + 1 < p.count && blockIdx.x >= p.tensors[t + 1].first_block) ++t;
  const Scaled& tensor = p.tensors[t];
  const int64_t block = blockIdx.x - tensor.first_block;
  switch (tensor.dtype) {
    case DType::float32: return scale_tensor<float>(tensor, block, factor);
    case DType::bfloat16: return scale_tensor<__nv_bfloat16>(tensor, block, factor);
    case DType::float16: return scale_tensor<__half>(tensor, block, factor);
    default: {  // fp64: the gradient of fp64 weights
      double* data = static_cast<double*>(tensor.data);
      for (int64_t k = threadIdx.x; k < tensor.size; k += threads) data[k] *= factor;
    }
  }
}

// ---- The host's side

int64_t bytes_of(DType dtype) {
  return dtype == DType::uint8 ? 1 : dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2;
}

Frames frames_of(const Array& array, int64_t patch, int64_t channels, int64_t width, int level) {
  const int64_t* s = array.stride;
  Frames frames{array.data, array.dtype, static_cast<int>(patch), -1, false, s[0], s[1], s[2], s[3], s[4], 0, 0};
  if (patch) {
    for (int shift = 0; shift < 31; ++shift)
      if (patch == int64_t(1) << shift) frames.shift = shift;
    frames.channel = s[3];
    frames.column = channels * s[3];
    frames.row = patch * frames.column;
    frames.patch_column = s[2];
    frames.patch_row = width / patch * s[2];
    return frames;
  }
  const int64_t bytes = bytes_of(array.dtype), together = std::min<int64_t>(16, (cell >> std::min(level, 3)) * bytes);
  frames.vectors = s[4] == 1 && reinterpret_cast<uintptr_t>(array.data) % together == 0;
  for (int axis = 0; axis < 4; ++axis)
    frames.vectors = frames.vectors && (array.size[axis] == 1 || s[axis] * bytes % together == 0);
  return frames;
}

Numbers numbers_of(const Array& array) {
  // A vector of pair weights is indexed by the far side.
  return {array.data, array.dtype, {array.rank == 2 ? array.stride[0] : 0, array.stride[array.rank == 2]}};
}

}  // namespace

void multi_horizon_loss(const MultiHorizonLoss& op, const MultiHorizonLossOnDevice& device, void* stream_handle) {
  const DeviceGuard guard(device.total.data);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Parameters p{};
  p.count = static_cast<int>(op.preds.size());
  p.pair_count = static_cast<int>(op.pairs.size() / 2);
  const int terms = p.count + p.pair_count;
  const int64_t* size = op.video.size;
  p.batch = size[0];
  p.frames = size[1];
  p.channels = static_cast<int>(size[2]);
  p.height = static_cast<int>(size[3]);
  p.width = static_cast<int>(size[4]);
  p.positions = op.preds[0].size[1];
  p.video = frames_of(op.video, 0, p.channels, p.width, 0);
  p.segment_ids = op.segment_ids;
  p.weights = numbers_of(device.weights);
  std::swap(p.weights.step[0], p.weights.step[1]);
  if (device.pair_weights) p.pair_weights = numbers_of(device.pair_weights);
  p.residual = op.residual;
  p.kind = op.kind;
  p.scale = static_cast<float>(op.scale);
  p.shift = static_cast<float>(op.shift);
  p.delta = static_cast<float>(op.delta);
  p.eps = static_cast<float>(op.eps);
  p.near_learns = op.detach != Detach::near;
  p.far_learns = op.detach != Detach::far;
  p.partial = static_cast<float*>(device.partial.data);
  p.term_counts = static_cast<const int64_t*>(device.term_counts.data);

  bool by_patches = true, any_gradient = false;
  for (int i = 0; i < p.count; ++i) {
    Horizon& h = p.horizons[i];
    h.factor = static_cast<int>(op.factors[i]);
    while (h.level < 3 && 1 << h.level < h.factor) ++h.level;
    by_patches = by_patches && 1 << h.level == h.factor;
    h.offset = op.offsets[i];
    h.height = p.height / h.factor;
    h.width = p.width / h.factor;
    const int64_t patch = op.patch_sizes.empty() ? 0 : op.patch_sizes[i];
    h.pred = frames_of(op.preds[i], patch, p.channels, h.width, h.level);
    if (op.gradients[i]) h.gradient = frames_of(op.gradients[i], patch, p.channels, h.width, h.level);
    any_gradient = any_gradient || op.gradients[i];
    h.slot = -1;
    p.order[i] = static_cast<uint8_t>(i);
  }
  for (int q = 0; q < p.pair_count; ++q) {
    p.pairs[q] = {static_cast<uint8_t>(op.pairs[2 * q]), static_cast<uint8_t>(op.pairs[2 * q + 1])};
    Horizon& far = p.horizons[p.pairs[q].far];
    if (far.slot >= 0 || !far.gradient.data || !p.far_learns) continue;
    far.slot = p.slots;
    p.slots += elements_at(far.level);
  }
  const auto finer = [&](int i, int j) { return p.horizons[i].level < p.horizons[j].level; };
  std::stable_sort(p.order, p.order + p.count, finer);
  std::stable_sort(p.pairs, p.pairs + p.pair_count, [&](Pair a, Pair b) { return finer(a.far, b.far); });

  if (device.term_counts)
    launch("multi_horizon_loss: counts", count_kernel, terms, threads, warps * sizeof(int64_t), stream, p,
           static_cast<int64_t*>(device.term_counts.data));

  // Predictions of frames beyond the video only get their zero gradient.
  const int64_t last = p.positions + p.horizons[p.count - 1].offset;
  p.first_moment = p.horizons[0].offset;
  p.moments = std::max<int64_t>(0, (any_gradient ? last : std::min(last, p.frames)) - p.first_moment);
  const auto shared_bytes = [&] { return (terms + static_cast<size_t>(terms + p.slots) * threads) * sizeof(float); };
  by_patches = by_patches && shared_bytes() <= most_shared_bytes;
  int64_t tiles;
  if (by_patches) {
    p.cells_y = (p.height + cell - 1) / cell;
    p.cells_x = (p.width + cell - 1) / cell;
    p.channels_fastest = !op.patch_sizes.empty() || op.video.stride[2] < op.video.stride[4];
    tiles = (int64_t(p.channels) * p.cells_y * p.cells_x + cells_of_block - 1) / cells_of_block;
  } else {
    p.slots = 0;
    tiles = (int64_t(p.channels) * p.height * p.width + threads * held - 1) / (threads * held);
  }
  const int64_t programs = p.positions == 0 ? 0 : p.batch * p.moments * tiles, most = int64_t(1) << 31;
  if (size[2] * size[3] * size[4] >= most || programs >= most)
    throw std::invalid_argument("multi_horizon_loss: a frame of video must have fewer than 2**31 elements, all frames "
                                "fewer than 2**31 tiles; they have " + std::to_string(size[2] * size[3] * size[4]) +
                                " and " + std::to_string(programs));
  p.tiles = static_cast<int>(tiles);
  p.programs = static_cast<unsigned>(programs);
  const int64_t blocks = std::min(programs, device.partial.size[1]);
  if (blocks > 0) {
    const auto by_dtype = op.preds[0].dtype == DType::float32    ? patch_kernel<float>
                          : op.preds[0].dtype == DType::bfloat16 ? patch_kernel<__nv_bfloat16>
                                                                 : patch_kernel<__half>;
    launch("multi_horizon_loss", by_patches ? by_dtype : gather_kernel, blocks, threads, shared_bytes(), stream, p);
  }
  const Results results{static_cast<float*>(device.total.data),
                        static_cast<float*>(device.per_horizon.data),
                        static_cast<float*>(device.agreement.data),
                        static_cast<int64_t*>(device.counts.data),
                        static_cast<int64_t*>(device.agreement_counts.data),
                        device.agreement.size[0] * device.agreement.size[1],
                        device.agreement.rank == 2};
  launch("multi_horizon_loss: finish", finish_kernel, 1, threads, terms * sizeof(float), stream, p, results, blocks);
}

void multi_horizon_loss_scale(const std::vector<Array>& tensors, const Array& upstream, void* stream) {
  if (tensors.empty()) return;
  const DeviceGuard guard(upstream.data);
  Scaling p{};
  p.upstream = static_cast<const float*>(upstream.data);
  int64_t blocks = 0;
  for (const Array& array : tensors) {
    Scaled& tensor = p.tensors[p.count++];
    tensor = {array.data, array.dtype, reinterpret_cast<uintptr_t>(array.data) % 16 == 0, 1, blocks};
    for (int axis = 0; axis < array.rank; ++axis) tensor.size *= array.size[axis];
    const int64_t by_block = threads * scaled_by_thread * 16 / bytes_of(array.dtype);
    blocks += array.dtype == DType::float64 ? 1 : (tensor.size + by_block - 1) / by_block;
  }
  if (blocks > 0)
    launch("multi_horizon_loss: scale", scale_kernel, blocks, threads, 0, static_cast<cudaStream_t>(stream), p);
}

}  // namespace mfwm::cuda
