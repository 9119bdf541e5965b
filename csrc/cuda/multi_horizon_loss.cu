// multi_horizon_loss in CUDA C++: losses and gradients in one frame-major pass, in the forward. bindings.cpp calls the
// function at the end, which launches these kernels:
//
// count_kernel    Counts the elements of each term (a horizon's loss or a pair's). Only with segments or position
//                 weights.
// patch_kernel    A block processes a tile of frame m of one clip. It computes the frame's pyramid in registers,
//                 compares the predictions of frame m (those at positions m - k_i) with it, and writes their gradients,
//                 including the pairs' part.
// gather_kernel   The same for factors other than 1, 2, 4 and 8: a thread reads everything that one element depends on.
// finish_kernel   Adds the blocks' sums in order and writes the outputs. The host reads nothing back.
#include "multi_horizon_loss.cuh"

namespace mfwm::cuda {
namespace {

constexpr int cells_of_block = threads / 4;
constexpr size_t max_shared_bytes = 48 << 10;

// ---- patch_kernel

// A thread's patch: a cell of the tile, and two rows of that cell.
struct Place {
  int c, y, x;  // the channel and the first pixel
  int quarter;  // which two rows of the cell
  bool exists;

  __device__ Place(const Parameters& p, int tile) {
    const int lane = threadIdx.x % 32;
    const int cell_index = tile * cells_of_block + static_cast<int>(threadIdx.x) / 32 * 8 + lane % 8;
    const int cells = p.cells_y * p.cells_x;
    c = p.channels_fastest ? cell_index % p.channels : cell_index / cells;
    const int at = p.channels_fastest ? cell_index / p.channels : cell_index % cells;
    quarter = lane / 8;
    y = at / p.cells_x * cell + 2 * quarter;
    x = at % p.cells_x * cell;
    exists = cell_index < cells * p.channels;
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
  __device__ bool is_owner(int level) const { return level < 2 || quarter % (1 << (level - 1)) == 0; }
};

// Load the thread's part of frame t at a level.
__device__ __forceinline__ void load_video(float (&v)[lane_pixels], const Parameters& p, const Place& place, int64_t b,
                                           int64_t t, int level) {
  const Frames& video = p.video;
  const Region region = place.at(0, p.height, p.width);
  load_region<AnyType>(v, video, b * video.batch + t * video.time + place.c * video.channel, region);
#pragma unroll
  for (int k = 0; k < lane_pixels; ++k) v[k] = v[k] * p.scale + p.shift;
  average(v, 0, level);
}

// Load the thread's part of the prediction of frame m, and of the frame at its position if that is needed.
template <class T>
__device__ __forceinline__ void load_prediction(float (&v)[lane_pixels], float (&current)[lane_pixels],
                                                const Parameters& p, const Horizon& h, const Place& place,
                                                const Work& work, bool needs_current) {
  const int64_t n = work.m - h.offset;
  load_region<T>(v, h.pred, work.b * h.pred.batch + n * h.pred.time + place.c * h.pred.channel, place.at(h));
  if (p.residual || needs_current) load_video(current, p, place, work.b, n, h.level);
  if (p.residual) {
#pragma unroll
    for (int k = 0; k < lane_pixels; ++k) v[k] += current[k];
  }
}

template <class T>
__device__ __forceinline__ void load_log_scale(float (&v)[lane_pixels], const Parameters& p, const Horizon& h,
                                               const Place& place, const Work& work) {
  const Frames& pred = h.pred;
  const int64_t start = work.b * pred.batch + (work.m - h.offset) * pred.time + place.c * pred.channel;
  load_region<T>(v, pred, start + pred.log_scale_offset(p.channels), place.at(h));
}

// The type that a gradient is stored in until the upstream gradient is known. fp16 gradients are stored in fp32,
// because many would be subnormal in fp16.
template <class T>
struct Stored {
  using type = T;
};
template <>
struct Stored<__half> {
  using type = float;
};

// T is the dtype of the predictions. The general kernel has AnyType, because one kernel compiles faster than three.
//
// Four blocks per multiprocessor leave a thread 128 registers, which is enough; without the bound the compiler uses fewer
// and spills. The general kernel needs 164, which leaves room for three.
template <class T, bool general>
__global__ void __launch_bounds__(threads, general ? 3 : 4) patch_kernel(const __grid_constant__ Parameters p) {
  BlockSums block(p);
  const int terms = p.count + p.pair_count;
  for (unsigned unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    Work work(p, unit);
    if constexpr (general) work.drop_weightless(p);
    const Place place(p, work.tile);
    float target[lane_pixels];
    int target_level = 0;
    if (work.counted) load_video(target, p, place, work.b, work.m, 0);
    for (int at = 0; at < p.count; ++at) {
      const int i = p.order[at];
      const Horizon& h = p.horizons[i];
      if (!work.is_active(i)) continue;
      float gradient[lane_pixels] = {}, prediction[lane_pixels];
      [[maybe_unused]] float log_scale[lane_pixels] = {};  // becomes its gradient
      int level = h.level;
      // Compare horizon i with the frame (q = -1), then the far sides of its pairs with horizon i.
      for (int q = -1; q < p.pair_count && work.is_counted(i); ++q) {
        if (q >= 0 && (p.pairs[q].near != i || !work.is_counted(p.pairs[q].far))) continue;
        const Horizon& far = p.horizons[q < 0 ? i : p.pairs[q].far];
        const int term = q < 0 ? i : p.count + q, elements = elements_at(far.level);
        float difference[lane_pixels], element_weight[lane_pixels];  // first, the frame at the prediction's position
        const bool weighs_motion = general && q < 0 && p.motion_gain > 0;
        load_prediction<T>(difference, element_weight, p, far, place, work, weighs_motion);
        if (q < 0) {
          average(target, target_level, h.level);
          target_level = h.level;
          for_elements(elements, [&](int k) { prediction[k] = difference[k], difference[k] -= target[k]; });
        } else {
          average(prediction, level, far.level);
          level = far.level;
          for_elements(elements, [&](int k) { difference[k] -= prediction[k]; });
        }
        float position_weight = 1;
        if constexpr (general) {
          if (q < 0 && is_distribution(h.kind)) load_log_scale<T>(log_scale, p, h, place, work);
          if (q < 0 && p.position_weights.rank >= 0)
            position_weight = position_weight_at<float>(p.position_weights, work.b, work.m - h.offset, i);
          for_elements(elements, [&](int k) {
            element_weight[k] = weighs_motion ? 1 + p.motion_gain * fabsf(target[k] - element_weight[k]) : 1.f;
          });
        }
        const LossKind kind = !general ? p.kind : q < 0 ? h.kind : kind_of_means(far.kind);
        const unsigned owned = place.is_owner(far.level) ? place.at(far).exists : 0;
        block.sum(term) += position_weight * with_kind<general>(kind, [&](auto known) {
          constexpr LossKind kind = decltype(known)::value;
          float sum = 0;
          for_elements(elements, [&](int k) {
            float loss;
            if constexpr (is_distribution(kind))
              loss = loss_of_distribution<kind>(difference[k], log_scale[k], p.beta);
            else
              loss = loss_of<kind>(difference[k], p.delta, p.eps);
            if constexpr (general) {
              loss *= element_weight[k];
              difference[k] *= element_weight[k];
              if constexpr (is_distribution(kind)) log_scale[k] *= element_weight[k];
            }
            if (owned >> k & 1) sum += loss;
          });
          return sum;
        });
        const float weight = position_weight * block.coefficients[term];
        if (far.slot >= 0)
          for_elements(elements, [&](int k) {
            float& slot = block.sum(terms + far.slot + k);
            if (q < 0) gradient[k] = slot;
            slot = q < 0 ? 0 : slot + weight * difference[k];
          });
        if (q < 0) {
          for_elements(elements, [&](int k) { gradient[k] += weight * difference[k]; });
          if constexpr (general) for_elements(elements, [&](int k) { log_scale[k] *= weight; });
        } else if (p.near_learns) {
          repeat(difference, far.level, h.level);
          const float share = weight / static_cast<float>(1 << 2 * (far.level - h.level));
          for_elements(elements_at(h.level), [&](int k) { gradient[k] -= share * difference[k]; });
        }
      }
      const Frames& to = h.gradient;
      if (to.data && place.is_owner(h.level)) {
        const int64_t start = work.b * to.batch + (work.m - h.offset) * to.time + place.c * to.channel;
        store_region<typename Stored<T>::type>(gradient, to, start, place.at(h));
        if constexpr (general) {
          if (is_distribution(h.kind))
            store_region<typename Stored<T>::type>(log_scale, to, start + to.log_scale_offset(p.channels), place.at(h));
        }
      }
    }
  }
  block.write_sums(p);
}

// ---- gather_kernel

// The mean of at(y, x) over a box; sums each row first.
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

__device__ __forceinline__ float prediction_at(const Parameters& p, const Horizon& h, const Work& work, int c,
                                               int y, int x) {
  const int64_t n = work.m - h.offset;
  const float pred = load<float>(h.pred.data, h.pred.dtype, h.pred.offset(work.b, n, c, y, x));
  return p.residual ? pred + frame_at(p, work.b, n, c, y, x, h.factor) : pred;
}

__device__ __forceinline__ float log_scale_at(const Parameters& p, const Horizon& h, const Work& work, int c, int y,
                                              int x) {
  const int64_t mean = h.pred.offset(work.b, work.m - h.offset, c, y, x);
  return load<float>(h.pred.data, h.pred.dtype, mean + h.pred.log_scale_offset(p.channels));
}

template <bool general>
__global__ void __launch_bounds__(threads, 4) gather_kernel(const __grid_constant__ Parameters p) {
  BlockSums block(p);
  for (unsigned unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    Work work(p, unit);
    if constexpr (general) work.drop_weightless(p);
    for (int i = 0; i < p.count; ++i) {
      const Horizon& h = p.horizons[i];
      if (!work.is_active(i)) continue;
      // The launcher ensures that a frame has fewer than 2^31 elements; the sums below can exceed that, so use
      // unsigned.
      const unsigned elements = p.channels * h.height * h.width, share = (elements + p.tiles - 1) / p.tiles;
      const unsigned first = min(elements, work.tile * share), end = min(elements, first + share);
      for (unsigned e = first + threadIdx.x; e < end; e += threads) {
        const int row = e / h.width, x = e - row * h.width, c = row / h.height, y = row - c * h.height;
        [[maybe_unused]] const int64_t n = work.m - h.offset;
        float gradient = 0, log_scale = 0;  // log_scale becomes its gradient
        if (work.is_counted(i)) {
          const float prediction = prediction_at(p, h, work, c, y, x);
          const float target = frame_at(p, work.b, work.m, c, y, x, h.factor);
          float d = prediction - target, weight = 1;
          const auto loss_of_d = [&](LossKind kind) {
            return with_kind<general>(general ? kind : p.kind, [&](auto known) {
              constexpr LossKind kind = decltype(known)::value;
              if constexpr (is_distribution(kind)) return loss_of_distribution<kind>(d, log_scale, p.beta);
              else return loss_of<kind>(d, p.delta, p.eps);
            });
          };
          if constexpr (general) {
            if (is_distribution(h.kind)) log_scale = log_scale_at(p, h, work, c, y, x);
            if (p.position_weights.rank >= 0) weight = position_weight_at<float>(p.position_weights, work.b, n, i);
            if (p.motion_gain > 0)
              weight *= 1 + p.motion_gain * fabsf(target - frame_at(p, work.b, n, c, y, x, h.factor));
          }
          block.sum(i) += weight * loss_of_d(h.kind);
          gradient = block.coefficients[i] * weight * d;
          log_scale *= block.coefficients[i] * weight;
          for (int q = 0; q < p.pair_count; ++q) {
            const Pair pair = p.pairs[q];
            const bool is_far = pair.far == i, learns = is_far ? p.far_learns : p.near_learns;
            if ((!is_far && pair.near != i) || (!is_far && !learns)) continue;
            if (!work.is_counted(pair.near) || !work.is_counted(pair.far)) continue;
            const Horizon &near = p.horizons[pair.near], &far = p.horizons[pair.far];
            const int ratio = far.factor / near.factor, far_y = is_far ? y : y / ratio, far_x = is_far ? x : x / ratio;
            d = is_far ? prediction : prediction_at(p, far, work, c, far_y, far_x);
            d -= mean_of_box(far_y, far_x, ratio, [&](int row, int column) {
              return prediction_at(p, near, work, c, row, column);
            });
            const float loss = loss_of_d(kind_of_means(far.kind)), share = block.coefficients[p.count + q];
            if (is_far) block.sum(p.count + q) += loss;
            if (learns) gradient += is_far ? share * d : -share * d / (static_cast<float>(ratio) * ratio);
          }
        }
        if (h.gradient.data)
          store<float>(h.gradient.data, h.gradient.dtype,
                       h.gradient.offset(work.b, work.m - h.offset, c, y, x), gradient);
        if constexpr (general) {
          const Frames& to = h.gradient;
          if (to.data && is_distribution(h.kind))
            store<float>(to.data, to.dtype, to.offset(work.b, n, c, y, x) + to.log_scale_offset(p.channels), log_scale);
        }
      }
    }
  }
  block.write_sums(p);
}

// ---- count_kernel and finish_kernel

template <bool general>
__global__ void __launch_bounds__(threads) count_kernel(const __grid_constant__ Parameters p, int64_t* counts) {
  int64_t* sums = dynamic_shared<int64_t>();
  const int term = static_cast<int>(blockIdx.x);
  const Span span = span_of(p, term);
  const int64_t ahead = p.horizons[span.far].offset;
  int64_t count = 0;
  for (int64_t row = threadIdx.x; row < p.batch * p.positions; row += threads) {
    const int64_t b = row / p.positions, n = row % p.positions;
    if (n + span.distance >= p.positions || n + ahead >= p.frames) continue;
    if constexpr (general) {
      if (!has_weight(p.position_weights, b, n, span.far)) continue;
      if (!has_weight(p.position_weights, b, n + span.distance, span.near)) continue;
      if (p.segment_ids.rank < 0) {
        ++count;
        continue;
      }
    }
    const int64_t target = segment_at(p.segment_ids, b, n + ahead);
    count += segment_at(p.segment_ids, b, n) == target && segment_at(p.segment_ids, b, n + span.distance) == target;
  }
  count = warp_sum(count);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < warps; ++warp) count += sums[warp];
  counts[term] = count * span.elements;
}

struct Results {
  float *total, *means, *consistency;
  int64_t *counts, *consistency_counts;
  int64_t consistency_size;
  bool consistency_by_pair;  // true: [K, K]; false: [K]
};

__global__ void __launch_bounds__(threads) finish_kernel(const __grid_constant__ Parameters p, const Results results,
                                                         int64_t blocks) {
  float* weighted = dynamic_shared<float>();
  const int lane = threadIdx.x % 32, terms = p.count + p.pair_count;
  for (int64_t k = threadIdx.x; k < results.consistency_size; k += threads)
    results.consistency[k] = 0, results.consistency_counts[k] = 0;
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
      const int place = (results.consistency_by_pair ? pair.near * p.count : 0) + pair.far;
      results.consistency[place] = mean;
      results.consistency_counts[place] = count_of(p, term);
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0;
  for (int term = 0; term < terms; ++term) total += weighted[term];
  *results.total = total;
}

// ---- Host code

Numbers numbers_of(const Array& array) {
  // A vector of pair weights is indexed by the far side.
  return {array.data, array.dtype, {array.rank == 2 ? array.stride[0] : 0, array.stride[array.rank == 2]}};
}

}  // namespace

void multi_horizon_loss(const MultiHorizonLoss& op, const MultiHorizonLossScratch& scratch, void* stream_handle) {
  const DeviceGuard guard(op.total.data);
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
  p.position_weights = op.position_weights;
  p.horizon_weights = numbers_of(op.horizon_weights);
  std::swap(p.horizon_weights.step[0], p.horizon_weights.step[1]);
  if (op.consistency_weights) p.consistency_weights = numbers_of(op.consistency_weights);
  p.residual = op.residual;
  p.kind = op.kinds[0];
  p.scale = static_cast<float>(op.scale);
  p.shift = static_cast<float>(op.shift);
  p.delta = static_cast<float>(op.delta);
  p.eps = static_cast<float>(op.eps);
  p.motion_gain = static_cast<float>(op.motion_gain);
  p.beta = static_cast<float>(op.beta);
  bool by_patches = true, any_gradient = false, general = p.motion_gain > 0 || p.position_weights.rank >= 0;
  for (const Array& gradient : op.gradients) any_gradient = any_gradient || gradient;
  p.near_learns = any_gradient && op.detach != Detach::near;
  p.far_learns = any_gradient && op.detach != Detach::far;
  p.partial = static_cast<float*>(scratch.partial.data);
  p.term_counts = static_cast<const int64_t*>(scratch.term_counts.data);

  for (int i = 0; i < p.count; ++i) {
    Horizon& h = p.horizons[i];
    h.factor = static_cast<int>(op.factors[i]);
    while (h.level < 3 && 1 << h.level < h.factor) ++h.level;
    by_patches = by_patches && 1 << h.level == h.factor;
    h.offset = op.offsets[i];
    h.kind = op.kinds[i];
    general = general || h.kind != p.kind || is_distribution(h.kind);
    h.height = p.height / h.factor;
    h.width = p.width / h.factor;
    const int64_t patch = op.patch_sizes.empty() ? 0 : op.patch_sizes[i];
    h.pred = frames_of(op.preds[i], patch, p.channels, h.width, h.level);
    if (op.gradients[i]) h.gradient = frames_of(op.gradients[i], patch, p.channels, h.width, h.level);
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

  if (scratch.term_counts)
    launch("multi_horizon_loss: counts", general ? count_kernel<true> : count_kernel<false>, terms, threads,
           warps * sizeof(int64_t), stream, p, static_cast<int64_t*>(scratch.term_counts.data));

  // Frames beyond the video are processed only to write zero gradients for their predictions.
  const int64_t last = p.positions + p.horizons[p.count - 1].offset;
  p.first_target = p.horizons[0].offset;
  p.targets = std::max<int64_t>(0, (any_gradient ? last : std::min(last, p.frames)) - p.first_target);
  const auto shared_bytes = [&] { return (terms + static_cast<size_t>(terms + p.slots) * threads) * sizeof(float); };
  by_patches = by_patches && shared_bytes() <= max_shared_bytes;
  int64_t tiles;
  if (by_patches) {
    p.cells_y = (p.height + cell - 1) / cell;
    p.cells_x = (p.width + cell - 1) / cell;
    p.channels_fastest = !op.patch_sizes.empty() || op.video.stride[2] < op.video.stride[4];
    tiles = (int64_t(p.channels) * p.cells_y * p.cells_x + cells_of_block - 1) / cells_of_block;
  } else {
    p.slots = 0;
    tiles = (int64_t(p.channels) * p.height * p.width + threads * lane_pixels - 1) / (threads * lane_pixels);
  }
  const int64_t units = p.positions == 0 ? 0 : p.batch * p.targets * tiles, limit = int64_t(1) << 31;
  if (size[2] * size[3] * size[4] >= limit || units >= limit)
    throw std::invalid_argument("multi_horizon_loss: a frame of video must have fewer than 2**31 elements, all frames "
                                "fewer than 2**31 tiles; they have " + std::to_string(size[2] * size[3] * size[4]) +
                                " and " + std::to_string(units));
  p.tiles = static_cast<int>(tiles);
  p.units = static_cast<unsigned>(units);
  const int64_t blocks = std::min(units, scratch.partial.size[1]);
  if (blocks > 0) {
    const DType dtype = op.preds[0].dtype;
    const auto by_patch = general                      ? patch_kernel<AnyType, true>
                          : dtype == DType::float32    ? patch_kernel<float, false>
                          : dtype == DType::bfloat16   ? patch_kernel<__nv_bfloat16, false>
                                                       : patch_kernel<__half, false>;
    const auto gather = general ? gather_kernel<true> : gather_kernel<false>;
    launch("multi_horizon_loss", by_patches ? by_patch : gather, blocks, threads, shared_bytes(), stream, p);
  }
  const Results results{static_cast<float*>(op.total.data),
                        static_cast<float*>(op.per_horizon.data),
                        static_cast<float*>(op.consistency.data),
                        static_cast<int64_t*>(op.counts.data),
                        static_cast<int64_t*>(op.consistency_counts.data),
                        op.consistency.size[0] * op.consistency.size[1],
                        op.consistency.rank == 2};
  launch("multi_horizon_loss: finish", finish_kernel, 1, threads, terms * sizeof(float), stream, p, results, blocks);
}

}  // namespace mfwm::cuda
