// The kernel of multi_horizon_loss for the common layouts (strips.cuh) and options: predictions in fp32 or bf16, one
// kind for all horizons, no distribution and no motion gain; one horizon at full resolution, and pairs of it with the
// others.
//
// A warp processes tiles of strips of frame m of one clip, without barriers. It compares the predictions of frame m
// with the frame: both are summed over boxes from level to level and compared with the far predictions of each. The
// gradients that the pairs give the near prediction are added up from the coarsest level down to level 0, which is
// compared last.
#include <limits>

#include "multi_horizon_loss.cuh"

namespace mfwm::cuda {
namespace {

// A unit of work is two tiles of a frame, because finding out what counts takes a while.
constexpr int tiles_of_unit = 2;

// Which calls a kernel serves. One for each kind, with and without a residual, would take minutes to compile.
enum class Calls {
  mse,  // without residual
  all,
};

// Replaces the differences by the derivatives of their losses. Returns the sum of the losses. Both lack the factors
// that p has for the kind.
template <Calls calls, int size>
__device__ __forceinline__ float losses_of(float (&d)[size], const Parameters& p) {
  float sum = 0;
  if (calls == Calls::mse) {
#pragma unroll
    for (int k = 0; k < size; ++k) sum += d[k] * d[k];
  } else if (p.kind == LossKind::charbonnier) {
#pragma unroll
    for (int k = 0; k < size; ++k) sum += loss_of<LossKind::charbonnier>(d[k], p.delta, p.eps);
  } else {
    // l1 is huber with a tiny delta, mse with a huge one.
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const float difference = d[k];
      // A NaN must propagate.
      d[k] = difference > p.delta ? p.delta : difference < -p.delta ? -p.delta : difference;
      sum += d[k] * (difference - 0.5f * d[k]);
    }
  }
  return sum;
}

// What a warp computes for one tile. T is the dtype of the predictions, S the kind of strip.
template <class T, class S, Calls calls>
struct Strips {
  template <int level>
  using Values = float[S::count(level)];
  template <int level>
  struct Loaded {
    Raw<S, level, T> raw;
    unsigned offset;  // in a frame
  };

  const Parameters& p;
  BlockSums& block;
  const Work& work;
  const StripPlace<S> place;
  const int b, m;
  const unsigned in_video;  // the strip in a frame of the video
  // The first far prediction of each level, loaded before anything is waited for.
  Loaded<1> first_1;
  Loaded<2> first_2;
  Loaded<3> first_3;

  __device__ Strips(const Parameters& parameters, BlockSums& sums, const Work& unit, int tile)
      : p(parameters), block(sums), work(unit), place(p.tiling, tile), b(static_cast<int>(unit.b)),
        m(static_cast<int>(unit.m)), in_video(place.offset(p.video, 0)) {}

  template <int level>
  __device__ __forceinline__ const Loaded<level>& first() const {
    if constexpr (level == 1) return first_1;
    else if constexpr (level == 2) return first_2;
    else return first_3;
  }
  __device__ __forceinline__ bool has_residual() const { return calls == Calls::all && p.residual; }
  __device__ __forceinline__ int coarsest() const { return p.horizons[p.order[p.count - 1]].level; }
  __device__ __forceinline__ bool is_near_counted() const { return work.is_counted(p.order[0]); }
  // The position that predicts this frame.
  __device__ __forceinline__ int position(int i) const { return m - static_cast<int>(p.horizons[i].offset); }

  // What does not count is left undefined, because nothing that depends on it is used.
  template <int level>
  __device__ __forceinline__ void load(Loaded<level>& loaded, int i) const {
    if (!work.is_counted(i)) return;
    const Frames& pred = p.horizons[i].pred;
    loaded.offset = place.offset(pred, level);
    loaded.raw.load(static_cast<const T*>(pred.data) + (start_of(pred, b, position(i)) + loaded.offset), pred);
  }

  template <int level>
  __device__ __forceinline__ void store(const Values<level>& gradient, int i, unsigned offset) const {
    const Frames& to = p.horizons[i].gradient;
    if (!to.data || !place.owns(level)) return;
    // In a frame, predictions and gradients have the same strides.
    store_strip<S, level>(gradient, static_cast<T*>(to.data) + (start_of(to, b, position(i)) + offset), to);
  }

  // The sums over boxes of frame t, at a level.
  template <int level>
  __device__ __forceinline__ void load_frame(Values<level>& sums, int t) const {
    if constexpr (level < 2) {
      load_video_strip<S, level>(sums, p.video, start_of(p.video, b, t) + in_video);
    } else {
      Values<level - 1> finer;
      load_frame<level - 1>(finer, t);
      sum_boxes<S, level>(finer, sums);
    }
  }

  // Add the frame that horizon i starts from to its prediction, which is the change from it; both are sums over boxes.
  template <int level>
  __device__ __forceinline__ void add_present(Values<level>& prediction, int i, int pixels) const {
    Values<level> present;
    load_frame<level>(present, position(i));
    const float scale = p.scale * pixels * inverse_area(level), shift = p.shift * pixels;
#pragma unroll
    for (int k = 0; k < S::count(level); ++k) prediction[k] += present[k] * scale + shift;
  }

  // Sum the losses of differences, and replace these by the derivatives. Returns the factor that these lack.
  template <int level>
  __device__ __forceinline__ float add_losses(Values<level>& differences, int term, float weight) const {
    const float loss = losses_of<calls>(differences, p);
    if (place.owns(level)) block.sum(term) += weight * p.loss_factor * loss;
    return weight * p.derivative_factor * block.coefficients[term];
  }
  __device__ __forceinline__ float weight_of_position(int i) const {
    return p.position_weights.rank < 0 ? 1 : position_weight_at<float>(p.position_weights, b, position(i), i);
  }

  // The far predictions from this level on, whose gradients are written. `frame` and `near` are sums over boxes of the
  // frame and of the near prediction; `near_gradient` returns what the pairs add to the gradient of each near pixel.
  template <int level>
  __device__ __forceinline__ void far(const Values<level>& frame, const Values<level>& near,
                                      Values<level>& near_gradient) const {
    Loaded<level> loaded = first<level>();
    for (int i = p.first_at[level]; i >= 0;) {
      const int next = p.horizons[i].next;
      Loaded<level> following;
      load<level>(following, next);
      if (work.is_counted(i)) compare<level>(loaded, frame, near, near_gradient, i);
      else store_zeros<level>(i);
      loaded = following;
      i = next;
    }
    if constexpr (level + 1 < levels) {
      if (level == coarsest()) return;
      Values<level + 1> coarse_frame, coarse_near, coarse_gradient = {};
      sum_boxes<S, level + 1>(frame, coarse_frame);
      sum_boxes<S, level + 1>(near, coarse_near);
      far<level + 1>(coarse_frame, coarse_near, coarse_gradient);
#pragma unroll
      for (int k = 0; k < S::count(level); ++k) near_gradient[k] += coarse_gradient[coarser<S, level>(k)];
    }
  }

  // Compare the far prediction of horizon i with the frame and with the near prediction.
  template <int level>
  __device__ __forceinline__ void compare(const Loaded<level>& loaded, const Values<level>& frame,
                                          const Values<level>& near, Values<level>& near_gradient, int i) const {
    constexpr float area = inverse_area(level);
    const float scale = p.scale * area;
    const int pair = p.horizons[i].pair;
    Values<level> gradient, apart;
    loaded.raw.convert(gradient);
    if (has_residual()) add_present<level>(gradient, i, 1);
#pragma unroll
    for (int k = 0; k < S::count(level); ++k) {
      apart[k] = gradient[k] - near[k] * area;
      gradient[k] -= frame[k] * scale + p.shift;
    }
    const float factor = add_losses<level>(gradient, i, weight_of_position(i));
#pragma unroll
    for (int k = 0; k < S::count(level); ++k) gradient[k] *= factor;
    if (pair >= 0 && is_near_counted()) {
      const float share = add_losses<level>(apart, p.count + pair, 1);
      if (p.far_learns) {
#pragma unroll
        for (int k = 0; k < S::count(level); ++k) gradient[k] += share * apart[k];
      }
      if (p.near_learns) {
#pragma unroll
        for (int k = 0; k < S::count(level); ++k) near_gradient[k] -= share * area * apart[k];
      }
    }
    store<level>(gradient, i, loaded.offset);
  }

  __device__ __forceinline__ void run() {
    const int near = p.order[0];
    Loaded<0> loaded;
    Values<1> near_gradient = {};
    if (work.counted) load<0>(loaded, near);
    if (work.counted && coarsest() > 0) {
      load<1>(first_1, p.first_at[1]);
      load<2>(first_2, p.first_at[2]);
      load<3>(first_3, p.first_at[3]);
      Values<1> frame, sums;
      load_frame<1>(frame, m);
      {
        Values<0> pixels;
        loaded.raw.convert(pixels);
        sum_boxes<S, 1>(pixels, sums);
      }
      if (has_residual() && is_near_counted()) add_present<1>(sums, near, 4);
      far<1>(frame, sums, near_gradient);
    }
    if (!work.counted) zeros<1>();
    if (is_near_counted()) finish_near(loaded, near_gradient, near);
    else store_zeros<0>(near);
  }

  // Compare the near prediction with the frame, which is in L1 by now. In registers it would leave room for fewer
  // warps.
  __device__ __forceinline__ void finish_near(const Loaded<0>& loaded, const Values<1>& near_gradient,
                                              int near) const {
    Values<0> gradient;
    load_frame<0>(gradient, m);
#pragma unroll
    for (int k = 0; k < S::count(0); ++k) gradient[k] = loaded.raw[k] - (gradient[k] * p.scale + p.shift);
    if (has_residual()) add_present<0>(gradient, near, 1);
    const float factor = add_losses<0>(gradient, near, weight_of_position(near));
#pragma unroll
    for (int k = 0; k < S::count(0); ++k) gradient[k] = gradient[k] * factor + near_gradient[coarser<S, 0>(k)];
    store<0>(gradient, near, loaded.offset);
  }

  // What does not count gets zero gradients.
  template <int level>
  __device__ __forceinline__ void store_zeros(int i) const {
    const Values<level> zero = {};
    if (work.is_active(i)) store<level>(zero, i, place.offset(p.horizons[i].pred, level));
  }
  template <int level>
  __device__ __forceinline__ void zeros() const {
    if constexpr (level < levels) {
      for (int i = p.first_at[level]; i >= 0; i = p.horizons[i].next) store_zeros<level>(i);
      zeros<level + 1>();
    }
  }
};

// Three blocks per multiprocessor leave a thread 168 registers: too few for two of fp32, all channels and all calls.
template <class T, class S, Calls calls>
constexpr int blocks_of_multiprocessor = S::whole + (sizeof(T) == 4) + (calls == Calls::all) >= 2 ? 2 : 3;

template <class T, class S, Calls calls>
__global__ void __launch_bounds__(threads, blocks_of_multiprocessor<T, S, calls>)
    strip_kernel(const __grid_constant__ Parameters p) {
  BlockSums block(p);
  for (unsigned unit = blockIdx.x * warps + threadIdx.x / 32; unit < p.units; unit += gridDim.x * warps) {
    Work work(p, unit);
    if (p.position_weights.rank >= 0) work.drop_weightless(p);
    const int end = min((work.tile + 1) * tiles_of_unit, p.frame_tiles);
#pragma unroll 1
    for (int tile = work.tile * tiles_of_unit; tile < end; ++tile)
      Strips<T, S, calls>(p, block, work, tile).run();
  }
  block.write_sums(p);
}

// ---- Host code

// What losses_of needs for the kind: losses and derivatives are those of huber times the factors, or those of mse or
// charbonnier itself.
void set_factors(Parameters& p, bool has_mse) {
  p.loss_factor = p.derivative_factor = 1;
  if (p.kind == LossKind::l1) {
    p.delta = 0x1p-60f;
    p.loss_factor = p.derivative_factor = 0x1p60f;
  } else if (p.kind == LossKind::mse) {
    p.delta = std::numeric_limits<float>::max();
    p.loss_factor = has_mse ? 1 : 2;
    p.derivative_factor = 2;
  }
}

template <class T, class S>
int64_t run_strip_kernel(Parameters& p, int64_t max_blocks, cudaStream_t stream) {
  p.slots = 0;
  p.tiling = tiling_of<S>(p.channels, p.height, p.width);
  p.frame_tiles = static_cast<int>(tiles_of<S>(p.tiling));
  const int64_t units = divide(p, (p.frame_tiles + tiles_of_unit - 1) / tiles_of_unit);
  const int64_t blocks = std::min((units + warps - 1) / warps, max_blocks);
  const bool has_mse = p.kind == LossKind::mse && !p.residual;
  set_factors(p, has_mse);
  auto* kernel = has_mse ? strip_kernel<T, S, Calls::mse> : strip_kernel<T, S, Calls::all>;
  if (blocks > 0) launch("multi_horizon_loss", kernel, blocks, threads, shared_bytes_of(p), stream, p);
  return blocks;
}

template <class S>
bool serves(const Parameters& p, const MultiHorizonLoss& op) {
  if (!serves_video<S>(op.video, p.video)) return false;
  for (int i = 0; i < p.count; ++i) {
    const Horizon& h = p.horizons[i];
    const Frames &pred = h.pred, &gradient = h.gradient;
    if (!serves_frames<S>(op.preds[i], pred, p.channels, h.level)) return false;
    if (!op.gradients[i]) continue;
    if (!serves_frames<S>(op.gradients[i], gradient, p.channels, h.level)) return false;
    if (gradient.channel != pred.channel || gradient.row != pred.row || gradient.column != pred.column ||
        gradient.row_jump != pred.row_jump || gradient.column_jump != pred.column_jump)
      return false;
  }
  return true;
}

template <class T>
int64_t run_strips_of(Parameters& p, const MultiHorizonLoss& op, int64_t max_blocks, cudaStream_t stream) {
  if (serves<PatchStrip>(p, op)) return run_strip_kernel<T, PatchStrip>(p, max_blocks, stream);
  if (serves<TokenStrip>(p, op)) return run_strip_kernel<T, TokenStrip>(p, max_blocks, stream);
  if (serves<ChannelStrip>(p, op)) return run_strip_kernel<T, ChannelStrip>(p, max_blocks, stream);
  if (serves<ImageStrip>(p, op)) return run_strip_kernel<T, ImageStrip>(p, max_blocks, stream);
  return no_blocks;
}

}  // namespace

int64_t run_strips(Parameters& p, const Choice& choice, int64_t max_blocks, cudaStream_t stream) {
  const int near = p.order[0];
  if (!choice.powers_of_2 || p.motion_gain > 0 || is_distribution(p.kind) || p.horizons[near].level > 0)
    return no_blocks;
  std::fill(p.first_at, p.first_at + levels, int8_t(-1));
  for (int k = p.count - 1; k >= 0; --k) {
    Horizon& h = p.horizons[p.order[k]];
    if (h.kind != p.kind || (k > 0 && h.level == 0)) return no_blocks;
    h.pair = -1;
    h.next = p.first_at[h.level];
    p.first_at[h.level] = static_cast<int8_t>(p.order[k]);
  }
  for (int q = 0; q < p.pair_count; ++q) {
    if (p.pairs[q].near != near) return no_blocks;
    p.horizons[p.pairs[q].far].pair = static_cast<int8_t>(q);
  }
  switch (choice.op.preds[0].dtype) {
    case DType::float32: return run_strips_of<float>(p, choice.op, max_blocks, stream);
    case DType::bfloat16: return run_strips_of<__nv_bfloat16>(p, choice.op, max_blocks, stream);
    default: return no_blocks;
  }
}

}  // namespace mfwm::cuda
