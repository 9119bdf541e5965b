// The kernel of multi_horizon_loss for factors 1, 2, 4 and 8 and any layout, distribution, weight or residual. A block
// processes a tile of frame m of one clip. It computes the frame's pyramid in registers, compares the predictions of
// frame m (those at positions m - k_i) with it, and writes their gradients, including the pairs' part.
#include "multi_horizon_loss.cuh"

namespace mfwm::cuda {
namespace {

constexpr int cells_of_block = threads / 4;
constexpr size_t max_shared_bytes = 48 << 10;

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
__device__ __forceinline__ void load_prediction(float (&v)[lane_pixels], float (&current)[lane_pixels],
                                                const Parameters& p, const Horizon& h, const Place& place,
                                                const Work& work, bool needs_current) {
  const int64_t n = work.m - h.offset;
  load_region<AnyType>(v, h.pred, work.b * h.pred.batch + n * h.pred.time + place.c * h.pred.channel, place.at(h));
  if (p.residual || needs_current) load_video(current, p, place, work.b, n, h.level);
  if (p.residual) {
#pragma unroll
    for (int k = 0; k < lane_pixels; ++k) v[k] += current[k];
  }
}

__device__ __forceinline__ void load_log_scale(float (&v)[lane_pixels], const Parameters& p, const Horizon& h,
                                               const Place& place, const Work& work) {
  const Frames& pred = h.pred;
  const int64_t start = work.b * pred.batch + (work.m - h.offset) * pred.time + place.c * pred.channel;
  load_region<AnyType>(v, pred, start + pred.log_scale_offset(p.channels), place.at(h));
}

// Without the bound of four blocks per multiprocessor, which leaves a thread 128 registers, the compiler uses fewer and
// spills. The general kernel needs 164, which leaves room for three.
template <bool general>
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
        load_prediction(difference, element_weight, p, far, place, work, weighs_motion);
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
          if (q < 0 && is_distribution(h.kind)) load_log_scale(log_scale, p, h, place, work);
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
        store_region<AnyType>(gradient, to, start, place.at(h));
        if constexpr (general) {
          if (is_distribution(h.kind))
            store_region<AnyType>(log_scale, to, start + to.log_scale_offset(p.channels), place.at(h));
        }
      }
    }
  }
  block.write_sums(p);
}

}  // namespace

int64_t run_patches(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream) {
  if (!choice.powers_of_2 || shared_bytes_of(p) > max_shared_bytes) return no_blocks;
  p.cells_y = (p.height + cell - 1) / cell;
  p.cells_x = (p.width + cell - 1) / cell;
  p.channels_fastest = choice.channels_fastest;
  const int64_t tiles = (int64_t(p.channels) * p.cells_y * p.cells_x + cells_of_block - 1) / cells_of_block;
  const int64_t blocks = std::min(divide(p, tiles), max_blocks);
  if (blocks > 0)
    launch("multi_horizon_loss", choice.general ? patch_kernel<true> : patch_kernel<false>, blocks, threads,
           shared_bytes_of(p), stream, p);
  return blocks;
}

}  // namespace mfwm::cuda
