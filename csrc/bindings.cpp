// The Python module mfwm_kernels._native: converts Python numbers and (pointer, dtype code, sizes, strides) tuples to
// the structs of ops.h, then calls the kernel with the GIL released. The launchers in mfwm_kernels/cpu and
// mfwm_kernels/cuda call it; mfwm_kernels/_native.pyi describes it to type checkers. Only this file includes pybind11,
// and no file in csrc includes torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "ops.h"

namespace py = pybind11;
using namespace mfwm;

namespace {

Array array_of(const py::handle& value) {
  Array array;
  if (value.is_none()) return array;
  const auto fields = value.cast<py::tuple>();
  const auto sizes = fields[2].cast<py::tuple>(), strides = fields[3].cast<py::tuple>();
  array.data = reinterpret_cast<void*>(fields[0].cast<uintptr_t>());
  array.dtype = static_cast<DType>(fields[1].cast<int>());
  array.rank = static_cast<int>(sizes.size());
  if (array.rank > 5) throw py::value_error("arrays have at most 5 dimensions");
  for (int axis = 0; axis < array.rank; ++axis) {
    array.size[axis] = sizes[axis].cast<int64_t>();
    array.stride[axis] = strides[axis].cast<int64_t>();
  }
  return array;
}

std::vector<Array> arrays_of(const py::list& values) {
  std::vector<Array> arrays;
  for (const py::handle& value : values) arrays.push_back(array_of(value));
  return arrays;
}

using Sizes = std::vector<int64_t>;
using Numbers = std::vector<double>;

ActionWindowSum window_of(const py::handle& actions, const py::handle& lag_weight, const py::handle& segment_ids,
                          const Sizes& offsets, int64_t window_start, const py::handle& sums, int threads) {
  return {array_of(actions), array_of(lag_weight), array_of(segment_ids), offsets,
          window_start,      array_of(sums),       threads};
}

FanOut fan_of(const py::handle& hidden, const py::handle& sums, const py::handle& norm_weight,
              const py::handle& norm_bias, bool layer, const Sizes& pool, double norm_eps, const py::list& outputs,
              int threads) {
  return {array_of(hidden), array_of(sums), array_of(norm_weight), array_of(norm_bias), layer, pool, norm_eps,
          arrays_of(outputs), threads};
}

MultiHorizonLinear heads_of(const py::handle& hidden, const py::handle& sums, const py::handle& inverse_rms,
                            const py::handle& means, int64_t first, int64_t tokens, double norm_eps, int threads) {
  return {array_of(hidden), array_of(sums), array_of(inverse_rms), array_of(means), first, tokens, norm_eps, threads};
}

MultiHorizonLinearSmall small_heads_of(const py::object& hidden, const py::object& actions,
                                       const py::object& lag_weight,
                                       const py::object& segment_ids, const py::object& condition,
                                       const py::object& norm_weight, const py::object& norm_bias, bool layer,
                                       double norm_eps, const Sizes& offsets, int64_t window_start,
                                       const py::list& weights, const py::list& biases) {
  return {array_of(hidden),      array_of(actions),   array_of(lag_weight), array_of(segment_ids), array_of(condition),
          array_of(norm_weight), array_of(norm_bias), layer,                norm_eps,              offsets,
          window_start,          arrays_of(weights),  arrays_of(biases)};
}

// `numbers` is a dict, because the compiler cannot tell four doubles in a row apart: a swap would go unnoticed.
MultiHorizonLoss loss_of(const py::list& preds, const py::list& gradients, const py::handle& video,
                         const py::handle& segment_ids, const py::handle& position_weights,
                         const py::handle& horizon_weights, const py::handle& consistency_weights, const Sizes& offsets,
                         const Sizes& factors, const Sizes& pairs, const Sizes& patch_sizes,
                         const std::vector<int>& kinds, int detach, bool residual, const py::dict& numbers,
                         const py::list& outputs) {
  const auto number = [&](const char* name) { return numbers[name].cast<double>(); };
  MultiHorizonLoss op;
  op.preds = arrays_of(preds);
  op.gradients = arrays_of(gradients);
  op.video = array_of(video);
  op.segment_ids = array_of(segment_ids);
  op.position_weights = array_of(position_weights);
  op.horizon_weights = array_of(horizon_weights);
  op.consistency_weights = array_of(consistency_weights);
  op.offsets = offsets;
  op.factors = factors;
  op.pairs = pairs;
  op.patch_sizes = patch_sizes;
  for (const int kind : kinds) op.kinds.push_back(static_cast<LossKind>(kind));
  op.detach = static_cast<Detach>(detach);
  op.residual = residual;
  op.motion_gain = number("motion_gain");
  op.beta = number("beta");
  op.scale = number("scale");
  op.shift = number("shift");
  op.delta = number("delta");
  op.eps = number("eps");
  op.total = array_of(outputs[0]);
  op.per_horizon = array_of(outputs[1]);
  op.counts = array_of(outputs[2]);
  op.consistency = array_of(outputs[3]);
  op.consistency_counts = array_of(outputs[4]);
  return op;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The compiled kernels of mfwm_kernels. Its Python code checks all arguments; this module checks none.";

  module.def("action_window_sum_forward",
             [](py::object actions, py::object lag_weight, py::object segment_ids, const Sizes& offsets,
                int64_t window_start, py::object sums, int threads) {
               const auto op = window_of(actions, lag_weight, segment_ids, offsets, window_start, sums, threads);
               py::gil_scoped_release release;
               cpu::action_window_sum_forward(op);
             });
  module.def("action_window_sum_backward",
             [](py::object actions, py::object lag_weight, py::object segment_ids, const Sizes& offsets,
                int64_t window_start, py::object sums, int threads, py::object actions_gradient,
                py::object lag_weight_gradient) {
               const auto op = window_of(actions, lag_weight, segment_ids, offsets, window_start, sums, threads);
               const ActionWindowSumGradients gradients{array_of(actions_gradient), array_of(lag_weight_gradient)};
               py::gil_scoped_release release;
               cpu::action_window_sum_backward(op, gradients);
             });
  module.def("fan_out_forward", [](py::object hidden, py::object sums, py::object norm_weight, py::object norm_bias,
                                   bool layer, const Sizes& pool, double norm_eps, const py::list& outputs,
                                   int threads) {
    const auto op = fan_of(hidden, sums, norm_weight, norm_bias, layer, pool, norm_eps, outputs, threads);
    py::gil_scoped_release release;
    cpu::fan_out_forward(op);
  });
  module.def("fan_out_backward",
             [](py::object hidden, py::object sums, py::object norm_weight, py::object norm_bias, bool layer,
                const Sizes& pool, double norm_eps, const py::list& upstream, int threads, py::object hidden_gradient,
                py::object sums_gradient, py::object norm_weight_gradient, py::object norm_bias_gradient,
                py::object gram, const Numbers& scale) {
               const auto op = fan_of(hidden, sums, norm_weight, norm_bias, layer, pool, norm_eps, upstream, threads);
               const FanOutGradients gradients{array_of(hidden_gradient),      array_of(sums_gradient),
                                               array_of(norm_weight_gradient), array_of(norm_bias_gradient),
                                               array_of(gram),                 scale};
               py::gil_scoped_release release;
               cpu::fan_out_backward(op, gradients);
             });
  module.def("multi_horizon_linear_forward",
             [](py::object hidden, py::object sums, py::object inverse_rms, py::object means, int64_t first,
                int64_t tokens, double norm_eps, int threads, py::object product, py::object projected, py::object head_sums, py::object bias,
                const py::list& outputs) {
               const auto op = heads_of(hidden, sums, inverse_rms, means, first, tokens, norm_eps, threads);
               const MultiHorizonLinearOutputs to{array_of(product), array_of(projected), array_of(head_sums),
                                                  array_of(bias), arrays_of(outputs)};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_forward(op, to);
             });
  module.def("multi_horizon_linear_scale",
             [](py::object hidden, py::object sums, py::object inverse_rms, py::object means, int64_t first,
                int64_t tokens, double norm_eps, int threads, const py::list& upstream, const py::list& outputs, py::object bias, py::object scaled,
                py::object shares, py::object scaled_sums) {
               const auto op = heads_of(hidden, sums, inverse_rms, means, first, tokens, norm_eps, threads);
               const MultiHorizonLinearScaled to{arrays_of(upstream), arrays_of(outputs), array_of(bias),
                                                 array_of(scaled),    array_of(shares),   array_of(scaled_sums)};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_scale(op, to);
             });
  module.def("multi_horizon_linear_combine",
             [](py::object hidden, py::object sums, py::object inverse_rms, py::object means, int64_t first,
                int64_t tokens, double norm_eps, int threads, py::object product, py::object shares, py::object hidden_gradient,
                py::object sums_gradient) {
               const auto op = heads_of(hidden, sums, inverse_rms, means, first, tokens, norm_eps, threads);
               const MultiHorizonLinearCombined to{array_of(product), array_of(shares), array_of(hidden_gradient),
                                                   array_of(sums_gradient)};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_combine(op, to);
             });
  module.def("multi_horizon_linear_monitor",
             [](py::object hidden, py::object sums, py::object inverse_rms, py::object means, int64_t first,
                int64_t tokens, double norm_eps, int threads, const py::list& states, py::object shares, const Numbers& scale,
                py::object hidden_gradient, py::object sums_gradient, py::object gram) {
               const auto op = heads_of(hidden, sums, inverse_rms, means, first, tokens, norm_eps, threads);
               const MultiHorizonLinearMonitored to{arrays_of(states), array_of(shares), scale,
                                                    array_of(hidden_gradient), array_of(sums_gradient), array_of(gram)};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_monitor(op, to);
             });
  module.def("multi_horizon_linear_small_forward",
             [](py::object hidden, py::object actions, py::object lag_weight, py::object segment_ids,
                py::object condition, py::object norm_weight, py::object norm_bias, bool layer, double norm_eps,
                const Sizes& offsets, int64_t window_start, const py::list& weights, const py::list& biases,
                const py::list& outputs) {
               const auto op = small_heads_of(hidden, actions, lag_weight, segment_ids, condition, norm_weight,
                                              norm_bias, layer, norm_eps, offsets, window_start, weights, biases);
               const auto to = arrays_of(outputs);
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_small_forward(op, to);
             });
  module.def("multi_horizon_linear_small_backward",
             [](py::object hidden, py::object actions, py::object lag_weight, py::object segment_ids,
                py::object condition, py::object norm_weight, py::object norm_bias, bool layer, double norm_eps,
                const Sizes& offsets, int64_t window_start, const py::list& weights, const py::list& biases,
                const py::list& upstream, py::object hidden_gradient, py::object actions_gradient,
                py::object lag_weight_gradient, py::object condition_gradient, py::object norm_weight_gradient,
                py::object norm_bias_gradient, const py::list& weight_gradients, const py::list& bias_gradients) {
               const auto op = small_heads_of(hidden, actions, lag_weight, segment_ids, condition, norm_weight,
                                              norm_bias, layer, norm_eps, offsets, window_start, weights, biases);
               const auto from = arrays_of(upstream);
               const MultiHorizonLinearSmallGradients to{
                   array_of(hidden_gradient),    array_of(actions_gradient),     array_of(lag_weight_gradient),
                   array_of(condition_gradient), array_of(norm_weight_gradient), array_of(norm_bias_gradient),
                   arrays_of(weight_gradients),  arrays_of(bias_gradients)};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_small_backward(op, from, to);
             });
  module.def("multi_horizon_linear_cross_entropy",
             [](py::object logits, py::object biases, py::object bias_rows, py::object ids, py::object starts,
                py::object scales, py::object losses, py::object hits, py::object predictions, int64_t entries,
                double label_smoothing, double z_loss, double softcap, bool gradients, int threads) {
               const MultiHorizonLinearCrossEntropy op{
                   array_of(logits), array_of(biases), array_of(bias_rows), array_of(ids),
                   array_of(starts), array_of(scales), array_of(losses),    array_of(hits),
                   array_of(predictions), entries, label_smoothing, z_loss, softcap, gradients, threads};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_cross_entropy(op);
             });
  module.def("multi_horizon_linear_cross_entropy_small",
             [](const py::list& inputs, const py::list& weights, const py::list& biases, py::object tokens,
                py::object horizon_weights, py::object segment_ids, py::object token_mask, py::object position_weights,
                const Sizes& offsets, const Sizes& factors, int64_t ignore_index, double label_smoothing, double z_loss,
                double softcap, bool gradients, const py::list& outputs, const py::list& input_gradients,
                const py::list& weight_gradients, const py::list& bias_gradients) {
               const MultiHorizonLinearCrossEntropySmall op{
                   arrays_of(inputs), arrays_of(weights), arrays_of(biases), array_of(tokens),
                   array_of(horizon_weights), array_of(segment_ids), array_of(token_mask), array_of(position_weights),
                   offsets, factors, ignore_index, label_smoothing, z_loss, softcap, gradients,
                   array_of(outputs[0]), array_of(outputs[1]), array_of(outputs[2]), array_of(outputs[3]),
                   array_of(outputs[4]), array_of(outputs[5]),
                   arrays_of(input_gradients), arrays_of(weight_gradients), arrays_of(bias_gradients)};
               py::gil_scoped_release release;
               return cpu::multi_horizon_linear_cross_entropy_small(op);
             });
  module.def("multi_horizon_linear_consistency",
             [](py::object near, py::object far, py::object near_bias, py::object far_bias, py::object known,
                py::object losses, int64_t ids_per_token, double softcap, double scale, bool near_gradients,
                bool far_gradients, int threads) {
               const MultiHorizonLinearConsistency op{
                   array_of(near), array_of(far), array_of(near_bias), array_of(far_bias), array_of(known),
                   array_of(losses), ids_per_token, softcap, scale, near_gradients, far_gradients, threads};
               py::gil_scoped_release release;
               cpu::multi_horizon_linear_consistency(op);
             });
  module.def("multi_horizon_linear_add", [](py::object sum, py::object term, int threads) {
    const Array to = array_of(sum), from = array_of(term);
    py::gil_scoped_release release;
    cpu::multi_horizon_linear_add(to, from, threads);
  });
  module.def("mtp_combine_norm", [](const py::list& states, py::object joined, double eps, int threads) {
    const MtpCombine op{arrays_of(states), array_of(joined), eps, threads};
    py::gil_scoped_release release;
    cpu::mtp_combine_norm(op);
  });
  module.def("mtp_combine_gradient", [](const py::list& states, py::object joined, double eps, int threads,
                                        const py::list& gradients) {
    const MtpCombine op{arrays_of(states), array_of(joined), eps, threads};
    const auto to = arrays_of(gradients);
    py::gil_scoped_release release;
    cpu::mtp_combine_gradient(op, to);
  });
  module.def("mtp_combine_small_forward", [](const py::list& states, const py::list& norm_weights, py::object weight,
                                             py::object out, double eps) {
    const MtpCombineSmall op{arrays_of(states), arrays_of(norm_weights), array_of(weight), array_of(out), eps};
    py::gil_scoped_release release;
    cpu::mtp_combine_small_forward(op);
  });
  module.def("mtp_combine_small_backward", [](const py::list& states, const py::list& norm_weights, py::object weight,
                                              py::object upstream, double eps, const py::list& state_gradients,
                                              const py::list& norm_gradients, py::object weight_gradient) {
    const MtpCombineSmall op{arrays_of(states), arrays_of(norm_weights), array_of(weight), array_of(upstream), eps};
    const MtpCombineGradients to{arrays_of(state_gradients), arrays_of(norm_gradients), array_of(weight_gradient)};
    py::gil_scoped_release release;
    cpu::mtp_combine_small_backward(op, to);
  });
  module.def("video_pyramid", [](py::object video, const Sizes& factors, const Sizes& patch_sizes, double scale,
                                 double shift, const py::list& outputs, int threads) {
    const VideoPyramid op{array_of(video), factors, patch_sizes, scale, shift, arrays_of(outputs), threads};
    py::gil_scoped_release release;
    cpu::video_pyramid(op);
  });
  module.def("multi_horizon_loss",
             [](const py::list& preds, const py::list& gradients, py::object video, py::object segment_ids,
                py::object position_weights, py::object horizon_weights, py::object consistency_weights,
                const Sizes& offsets, const Sizes& factors, const Sizes& pairs, const Sizes& patch_sizes,
                const std::vector<int>& kinds, int detach, bool residual, const py::dict& numbers,
                const py::list& outputs, int threads) {
               const auto op = loss_of(preds, gradients, video, segment_ids, position_weights, horizon_weights,
                                       consistency_weights, offsets, factors, pairs, patch_sizes, kinds, detach,
                                       residual, numbers, outputs);
               py::gil_scoped_release release;
               cpu::multi_horizon_loss(op, threads);
             });

#ifdef MFWM_WITH_CUDA
  module.def("cuda_video_pyramid", [](py::object video, const Sizes& factors, const Sizes& patch_sizes, double scale,
                                      double shift, const py::list& outputs, uintptr_t stream) {
    const VideoPyramid op{array_of(video), factors, patch_sizes, scale, shift, arrays_of(outputs), 0};
    py::gil_scoped_release release;
    cuda::video_pyramid(op, reinterpret_cast<void*>(stream));
  });
  module.def("cuda_multi_horizon_loss",
             [](const py::list& preds, const py::list& gradients, py::object video, py::object segment_ids,
                py::object position_weights, py::object horizon_weights, py::object consistency_weights,
                const Sizes& offsets, const Sizes& factors, const Sizes& pairs, const Sizes& patch_sizes,
                const std::vector<int>& kinds, int detach, bool residual, const py::dict& numbers,
                const py::list& outputs, py::object term_counts, py::object partial, uintptr_t stream) {
               const auto op = loss_of(preds, gradients, video, segment_ids, position_weights, horizon_weights,
                                       consistency_weights, offsets, factors, pairs, patch_sizes, kinds, detach,
                                       residual, numbers, outputs);
               const MultiHorizonLossScratch scratch{array_of(term_counts), array_of(partial)};
               py::gil_scoped_release release;
               cuda::multi_horizon_loss(op, scratch, reinterpret_cast<void*>(stream));
             });
  module.def("cuda_multi_horizon_loss_scale", [](const py::list& tensors, py::object upstream, uintptr_t stream) {
    const std::vector<Array> arrays = arrays_of(tensors);
    const Array factor = array_of(upstream);
    py::gil_scoped_release release;
    cuda::multi_horizon_loss_scale(arrays, factor, reinterpret_cast<void*>(stream));
  });
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif

  py::dict build_info;
#ifdef __VERSION__
  build_info["compiler"] = std::string(__VERSION__);
#endif
  build_info["cuda"] = std::string(MFWM_CUDA_VERSION);
  build_info["cuda_architectures"] = std::string(MFWM_CUDA_ARCHITECTURES);
  build_info["signatures"] = std::string(MFWM_SIGNATURES);
  build_info["simd"] = std::string(MFWM_SIMD_LEVELS);
  module.attr("build_info") = build_info;
}
