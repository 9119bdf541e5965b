// The kernel of multi_horizon_loss for every factor: a thread reads everything that one element depends on.
#include "multi_horizon_loss.cuh"

namespace mfwm::cuda {
namespace {

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

}  // namespace

int64_t run_gather(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream) {
  constexpr int elements = threads * lane_pixels;
  p.slots = 0;
  const int64_t tiles = (int64_t(p.channels) * p.height * p.width + elements - 1) / elements;
  const int64_t blocks = std::min(divide(p, tiles), max_blocks);
  if (blocks > 0)
    launch("multi_horizon_loss", choice.general ? gather_kernel<true> : gather_kernel<false>, blocks, threads,
           shared_bytes_of(p), stream, p);
  return blocks;
}

}  // namespace mfwm::cuda
