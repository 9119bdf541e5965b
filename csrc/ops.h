// The arguments of every C++ and CUDA kernel: plain structs, one or more per op, with pointers, sizes, strides and
// numbers. bindings.cpp fills the structs and calls the functions at the end of this file. Python has checked
// everything in them; kernels check nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace mfwm {

// The Python side passes these codes (CODES in mfwm_kernels/native.py): change both together.
enum class DType : int { uint8 = 0, float32 = 1, bfloat16 = 2, float16 = 3, float64 = 4, int32 = 5, int64 = 6 };

// A tensor; sizes and strides count elements. Rank -1 means None.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  int rank = -1;
  int64_t size[5] = {1, 1, 1, 1, 1};
  int64_t stride[5] = {0, 0, 0, 0, 0};

  explicit operator bool() const { return rank >= 0; }
};

// sums[b, n, i] = sum over lags j in [window_start, offsets[i]) of lag_weight[i, j] * actions[b, n + j]
struct ActionWindowSum {
  Array actions;      // [B, A, D]
  Array lag_weight;   // [K, J, D] or none
  Array segment_ids;  // [B, A] int32 or int64, or none
  std::vector<int64_t> offsets;
  int64_t window_start;
  Array sums;  // [B, N, K, D], any N: the forward writes it; the backward reads the upstream gradient from it
  int threads;
};

struct ActionWindowSumGradients {
  Array actions;     // [B, A, D] or none
  Array lag_weight;  // [K, J, D] or none
};

// outputs[i] = norm(avg_pool(hidden, pool[i]) + sums[:, :, i]), where norm is RMSNorm or LayerNorm
struct FanOut {
  Array hidden;       // [B, T, Hp, Wp, D]
  Array sums;         // [B, T, K, D], contiguous, in the compute precision: float64 if hidden is, else float32
  Array norm_weight;  // [D] or [K, D], or none: no norm
  Array norm_bias;    // [D] or [K, D], or none; only with `layer`
  bool layer;         // LayerNorm, else RMSNorm
  std::vector<int64_t> pool;
  double norm_eps;
  std::vector<Array> outputs;  // K of [B, T, Hp / p, Wp / p, D]; the backward's upstream gradients, some may be none
  int threads;
};

struct FanOutGradients {
  Array hidden;               // [B, T, Hp, Wp, D] or none
  Array sums;                 // [B, T, K, D] or none, contiguous, of the dtype of FanOut.sums
  Array norm_weight;          // of FanOut.norm_weight's shape, or none
  Array norm_bias;            // of FanOut.norm_bias's shape, or none; only with `layer`
  Array gram;                 // [K, K] or none, float64: dot products of the horizons' gradients at hidden
  std::vector<double> scale;  // per horizon: multiplies its gradient at hidden only
};

// A chunk of rows of multi_horizon_linear. torch computes the matrix products; these kernels compute the rest. With
// x_i = hidden + sums[position, i]: outputs[i] = r_i x_i W_i^T + bias_i, where r_i = rsqrt(mean(x_i^2) + eps), or 1
// without a norm. LayerNorm is the same formula on centred rows: x_i = hidden - means + sums[position, i], where the rows
// of sums and W have a mean of 0. "Precision" below is the compute precision: float64 if hidden is, else float32.
struct MultiHorizonLinear {
  Array hidden;           // [R, D]
  Array sums;             // [B * T, K, D], contiguous, precision
  // Both written by the forward and read by the others, precision. With a norm, [K, R], rows contiguous: 1 / the root
  // mean square of row r conditioned on horizon i. With LayerNorm, [R]: the means of hidden's rows. Otherwise none.
  Array inverse_rms, means;
  int64_t first, tokens;  // row r is at position (first + r) / tokens
  double norm_eps;
  int threads;
};

struct MultiHorizonLinearOutputs {
  Array product;               // [R, N]: hidden W^T, all heads side by side
  Array projected;             // [B * T, N], contiguous, precision: sums[:, i] W_i^T
  Array head_sums;             // [N], precision, with LayerNorm: sums over the rows of W, 0 but for W's rounding
  Array bias;                  // [N] or none, precision
  std::vector<Array> outputs;  // K of [R, N_i]
};

struct MultiHorizonLinearScaled {
  std::vector<Array> gradients, outputs;  // K of [R, N_i]; a gradient may be none
  Array bias;                             // as above
  Array scaled;                           // written, [R, N]: r_i gradients[i] side by side
  Array shares;  // written, [R, K], contiguous, precision: the norm subtracts shares[i] x_i from x_i's gradient
  Array sums;    // [B * T, N] or none, contiguous, precision; accumulates `scaled` summed over tokens
};

struct MultiHorizonLinearCombined {
  Array product;  // [R, D]: the sum of scaled_i W_i over all heads
  Array shares;   // from multi_horizon_linear_scale
  Array hidden;   // written, [R, D] or none; may be `product`
  Array sums;     // [B * T, K, D] or none, contiguous, precision; the norm's part shares[i] x_i is subtracted from it
};

struct MultiHorizonLinearMonitored {
  std::vector<Array> states;    // K of [R, D], each may be none: scaled_i W_i
  Array shares;                 // from multi_horizon_linear_scale
  std::vector<double> scale;  // per horizon: multiplies its gradient at hidden only; empty for ones
  Array hidden;                 // written, [R, D]
  Array sums;                   // [B * T, K, D] or none, contiguous, precision; accumulates the gradients
  Array gram;                   // [K, K], float64; accumulates dot products of the horizons' gradients at hidden
};

// A call of multi_horizon_linear so small that one kernel computes it whole, window sums and matrix products included.
struct MultiHorizonLinearSmall {
  Array hidden;                            // [B, T, ..., D]
  Array actions, lag_weight, segment_ids;  // of ActionWindowSum, each may be none
  Array condition;                         // [B, T, K, D] or none
  Array norm_weight, norm_bias;            // [D] or [K, D], each may be none
  bool layer;                              // LayerNorm, else RMSNorm
  double norm_eps;
  std::vector<int64_t> offsets;
  int64_t window_start;
  std::vector<Array> weights;  // K of [N_i, D]
  std::vector<Array> biases;   // K of [N_i], or none at all
};

// The gradients of the fields above, each may be none.
struct MultiHorizonLinearSmallGradients {
  Array hidden, actions, lag_weight, condition, norm_weight, norm_bias;
  std::vector<Array> weights, biases;
};

// joined = (states[0] / rms(states[0]), states[1] / rms(states[1]))
struct MtpCombine {
  std::vector<Array> states;  // 2 of [R, D]
  Array joined;               // [R, 2 D]: mtp_combine_norm writes it; mtp_combine_gradient reads its gradient from it
  double eps;
  int threads;
};

// A call of mtp_combine so small that one kernel computes it whole, matrix product included.
struct MtpCombineSmall {
  std::vector<Array> states;        // 2 of [..., D]
  std::vector<Array> norm_weights;  // 2 of [D]
  Array weight;                     // [N, 2 D]
  Array out;                        // [..., N]: the forward writes it; the backward reads its gradient from it
  double eps;
};

struct MtpCombineGradients {
  std::vector<Array> states, norm_weights;  // 2 each, each may be none
  Array weight;                             // may be none
};

// A chunk of rows, of any horizons, of multi_horizon_linear_cross_entropy. torch computes the matrix products. A row has
// E entries, one for each horizon that shares its logits; those without ids do not count. The kernel overwrites a row's
// logits with the gradient of the sum of its entries' losses times their scales. "Precision" is float64 for float64
// logits, else float32. All arrays but the logits are contiguous.
struct MultiHorizonLinearCrossEntropy {
  Array logits;                             // [R, V], of unit stride
  Array biases;                             // [N, V], contiguous, precision; or none
  Array bias_rows;                          // [R] int32: the row of `biases` to add to each row of logits
  Array ids;                                // int32: the target ids of each entry; negative ids are ignored
  Array starts;                             // [R * E + 1] int64: entry x's ids are ids[starts[x]] to ids[starts[x + 1] - 1]
  Array scales;                             // [R * E], precision
  Array losses;                             // [R * E], precision
  Array hits;                               // [R * E] int32, or none: 1 where the argmax is the entry's most frequent id
  Array predictions;                        // [R] int32, or none: the argmax before softcap, of every row
  int64_t entries;                          // E
  double label_smoothing, z_loss, softcap;  // softcap 0: none
  bool gradients;                           // false: leave the logits alone
  int threads;
};

// Cross-entropy of each far row against the mean of its near rows' distributions. The kernel overwrites logits with
// their gradients, times `scale`.
struct MultiHorizonLinearConsistency {
  Array near;      // [C * S, F * V], of unit stride; the S rows of a cell are adjacent
  Array far;       // [C, F * V], of unit stride
  Array near_bias, far_bias;  // [F * V], contiguous, precision; or none
  // [C * S, F, N] int32, contiguous, or none: each id that is not negative teaches its one-hot, in place of a share of
  // 1 / N of its near distribution.
  Array known;
  Array losses;    // [C, F], contiguous, precision
  int64_t ids_per_token;  // F
  double softcap, scale;
  bool near_gradients, far_gradients;
  int threads;
};

// A call of multi_horizon_linear_cross_entropy so small that one kernel computes it whole, matrix products included. It
// has no consistency pairs, and no horizons that share logits. "Precision" as above.
struct MultiHorizonLinearCrossEntropySmall {
  std::vector<Array> inputs;   // K of [B, T, h, w, D]
  std::vector<Array> weights;  // 1 or K of [F * V, D]
  std::vector<Array> biases;   // 0, 1 or K of [F * V]
  Array tokens;                // [B, T_v, Hp, Wp] or [B, T_v, Hp, Wp, F], int32 or int64
  Array horizon_weights;       // [K] float32 or float64
  Array segment_ids;           // [B, T_v] or none
  Array token_mask;            // [B, T_v, Hp, Wp] uint8 or none
  Array position_weights;      // [B, T, K] float32 or float64, or none
  std::vector<int64_t> offsets, factors;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;  // softcap 0: none
  bool gradients;                           // whether any of those below is needed
  // Written, contiguous. Precision, but counts are int64; the two of consistency get zeros.
  Array total, per_horizon, counts, consistency, consistency_counts, accuracy;  // [], then [K]; accuracy may be none
  std::vector<Array> input_gradients, weight_gradients, bias_gradients;         // of the fields above, each may be none
};

// outputs[i] = avg_pool(scale * video + shift, factors[i])
struct VideoPyramid {
  Array video;  // [B, T, C, H, W]
  std::vector<int64_t> factors;
  std::vector<int64_t> patch_sizes;  // empty: image layout
  double scale, shift;
  std::vector<Array> outputs;  // [B, T, C, H / f, W / f] or [B, T, S, P * P * C]
  int threads;
};

enum class LossKind : int { mse = 0, l1 = 1, huber = 2, charbonnier = 3, gaussian = 4, laplace = 5 };
enum class Detach : int { none = 0, near = 1, far = 2 };

struct MultiHorizonLoss {
  // K of [B, T, C, H / f, W / f] or [B, T, S, P * P * C]; twice the channels for gaussian and laplace: means, then
  // log-scales.
  std::vector<Array> preds;
  std::vector<Array> gradients;  // written, K; none for predictions that need no gradient
  Array video;                   // [B, T_v, C, H, W]
  Array segment_ids;             // [B, T_v] or none
  Array position_weights;        // [B, T, K] float32 or float64, or none
  Array horizon_weights;         // [K] float32 or float64
  Array consistency_weights;     // [K], indexed by a pair's far side, or [K, K], or none
  std::vector<int64_t> offsets, factors;
  std::vector<int64_t> pairs;        // i0, j0, i1, j1, ...
  std::vector<int64_t> patch_sizes;  // empty: image layout
  std::vector<LossKind> kinds;       // K
  Detach detach;
  bool residual;
  double motion_gain, beta, scale, shift, delta, eps;
  // The outputs, contiguous: float32 or float64, counts int64.
  Array total, per_horizon, counts;  // [], [K], [K]
  // In the shape of consistency_weights, or [K] without weights; zero where there is no pair.
  Array consistency, consistency_counts;
};

// Scratch memory for the CUDA kernels of multi_horizon_loss.
struct MultiHorizonLossScratch {
  // [terms] int64 with segments or position weights, else none. The terms are the horizons, then the pairs.
  Array term_counts;
  Array partial;      // [terms, blocks] float32; caps the number of blocks launched
};

namespace cpu {
void action_window_sum_forward(const ActionWindowSum&);
void action_window_sum_backward(const ActionWindowSum&, const ActionWindowSumGradients&);
void fan_out_forward(const FanOut&);
void fan_out_backward(const FanOut&, const FanOutGradients&);
void multi_horizon_linear_forward(const MultiHorizonLinear&, const MultiHorizonLinearOutputs&);
void multi_horizon_linear_scale(const MultiHorizonLinear&, const MultiHorizonLinearScaled&);
void multi_horizon_linear_combine(const MultiHorizonLinear&, const MultiHorizonLinearCombined&);
void multi_horizon_linear_monitor(const MultiHorizonLinear&, const MultiHorizonLinearMonitored&);
void multi_horizon_linear_small_forward(const MultiHorizonLinearSmall&, const std::vector<Array>& outputs);
void multi_horizon_linear_small_backward(const MultiHorizonLinearSmall&, const std::vector<Array>& upstream,
                                         const MultiHorizonLinearSmallGradients&);
void multi_horizon_linear_cross_entropy(const MultiHorizonLinearCrossEntropy&);
void multi_horizon_linear_consistency(const MultiHorizonLinearConsistency&);
// Returns false, and writes nothing, if an id is out of range.
bool multi_horizon_linear_cross_entropy_small(const MultiHorizonLinearCrossEntropySmall&);
// sum += term, both [N, D]; `sum` is float32 and contiguous.
void multi_horizon_linear_add(const Array& sum, const Array& term, int threads);
void mtp_combine_norm(const MtpCombine&);
void mtp_combine_gradient(const MtpCombine&, const std::vector<Array>& gradients);  // 2 of [R, D], each may be none
void mtp_combine_small_forward(const MtpCombineSmall&);
void mtp_combine_small_backward(const MtpCombineSmall&, const MtpCombineGradients&);
void video_pyramid(const VideoPyramid&);
void multi_horizon_loss(const MultiHorizonLoss&, int threads);
}  // namespace cpu

namespace cuda {
void video_pyramid(const VideoPyramid&, void* stream);
void multi_horizon_loss(const MultiHorizonLoss&, const MultiHorizonLossScratch&, void* stream);
// tensors *= upstream, a scalar in device memory; the tensors must be dense.
void multi_horizon_loss_scale(const std::vector<Array>& tensors, const Array& upstream, void* stream);
}  // namespace cuda

}  // namespace mfwm
