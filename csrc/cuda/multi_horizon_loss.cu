// multi_horizon_loss in CUDA C++: losses and gradients in one frame-major pass, in the forward. bindings.cpp calls the
// function at the end, which launches these kernels:
//
// count_kernel    Counts the elements of each term (a horizon's loss or a pair's). Only with segments or position
//                 weights.
// strip_kernel    For the common layouts and options: a warp processes a tile of strips of a frame.
// patch_kernel    For the other layouts and options.
// gather_kernel   For the other factors.
// finish_kernel   Adds the blocks' sums in order and writes the outputs. The host reads nothing back.
//
// The second to fourth are in multi_horizon_loss_strips.cu, _patches.cu and _gather.cu. The first of them that serves
// a call computes its losses and gradients.
#include "multi_horizon_loss.cuh"

namespace mfwm::cuda {
namespace {

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
  bool powers_of_2 = true, any_gradient = false, general = p.motion_gain > 0 || p.position_weights.rank >= 0;
  for (const Array& gradient : op.gradients) any_gradient = any_gradient || gradient;
  p.near_learns = any_gradient && op.detach != Detach::near;
  p.far_learns = any_gradient && op.detach != Detach::far;
  p.partial = static_cast<float*>(scratch.partial.data);
  p.term_counts = static_cast<const int64_t*>(scratch.term_counts.data);

  for (int i = 0; i < p.count; ++i) {
    Horizon& h = p.horizons[i];
    h.factor = static_cast<int>(op.factors[i]);
    while (h.level < 3 && 1 << h.level < h.factor) ++h.level;
    powers_of_2 = powers_of_2 && 1 << h.level == h.factor;
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
  const Choice choice{op, general, powers_of_2, !op.patch_sizes.empty() || op.video.stride[2] < op.video.stride[4]};
  int64_t blocks = no_blocks;
  for (const auto run : {run_strips, run_patches, run_gather})
    if (blocks == no_blocks) blocks = run(p, choice, scratch.partial.size[1], stream);
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
