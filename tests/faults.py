"""The faults that planted_faults.py plants: a text of a file, what takes its place, and the tests that should fail."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    kind: str
    file: str
    right: str
    wrong: str
    tests: str  # arguments of pytest

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


def values_of(case: str) -> str:
    return f"tests/test_ops.py -k 'values_and_gradients and {case}'"


def emulated(case: str) -> str:
    return f"tests/test_cuda_emulated.py -k 'values_and_gradients and {case}'"


# Faults of one C++ file are neighbours: the next one then compiles that file alone.
FAULTS = [
    # ---- the values of a kernel
    Fault(
        "the window is one action short", "kernel", "csrc/cpu/action_window_sum.cpp",
        "lag < op.offsets[i] && n + lag < steps;", "lag + 1 < op.offsets[i] && n + lag < steps;",
        values_of("action_window_sum-cpu-float32"),
    ),
    Fault(
        "a norm without eps", "kernel", "csrc/cpu/mtp_combine.cpp",
        " + static_cast<C>(eps)", "",
        values_of("mtp_combine-cpu-float32"),
    ),
    Fault(
        "a small call's condition is not added", "kernel", "csrc/cpu/multi_horizon_linear_small.cpp",
        "sums[k] += condition[k];", "sums[k] += 0 * condition[k];",
        values_of("multi_horizon_linear-cpu-float32"),
    ),
    Fault(
        "a pair counts where its near side does not", "kernel", "csrc/cpu/multi_horizon_loss.cpp",
        "+= counted(pairs[p].near, b, m) && counted(", "+= counted(",
        values_of("multi_horizon_loss-cpu-float32"),
    ),
    Fault(
        "a box of three is averaged over four", "kernel", "mfwm_kernels/triton/frames.py",
        "(1.0 / (RATIO * RATIO))", "(1.0 / (PADDED * PADDED))",
        values_of("video_pyramid-triton-float32"),
    ),
    Fault(
        "a box's gradient is not divided among its pixels", "kernel", "mfwm_kernels/triton/video_pyramid.py",
        "(scale * ((TRUE[level] / TRUE[0]) * (TRUE[level] / TRUE[0])))", "scale",
        values_of("video_pyramid-triton-float32"),
    ),
    Fault(
        "actions of another episode are added", "kernel", "mfwm_kernels/triton/action_window_sum.py",
        "(tl.load(segments + (n + j) * segment_strides[1], counts, 0) == segment)", "(n + j >= 0)",
        values_of("action_window_sum-triton-float32"),
    ),
    Fault(
        "frames of another episode are predicted", "kernel", "mfwm_kernels/triton/multi_horizon_loss.py",
        "counts_here & (then == tl.load(clip + m.to(tl.int64) * segment_strides[1], counts_here, 0))", "counts_here",
        "tests/ops/test_multi_horizon_loss.py -k 'may_be_nan and triton'",
    ),
    Fault(
        "the second state meets the first one's weights", "kernel", "mfwm_kernels/triton/mtp_combine.py",
        "(half * depth + d)[None, :]", "d[None, :]",
        values_of("mtp_combine-triton-float32"),
    ),
    Fault(
        "Charbonnier's eps is not squared", "kernel", "csrc/cuda/multi_horizon_loss.cuh",
        "difference * difference + eps * eps", "difference * difference + eps",
        emulated("multi_horizon_loss-float32-start"),
    ),
    Fault(
        "every horizon takes the near one's statistics", "kernel", "mfwm_kernels/triton/multi_horizon_linear.py",
        "tl.load(inverse_rms + i * rows + row, in_rows, 0)", "tl.load(inverse_rms + row, in_rows, 0)",
        values_of("multi_horizon_linear-triton-float32"),
    ),
    Fault(
        "every piece of a head has its first columns", "kernel", "mfwm_kernels/triton/multi_horizon_linear_narrow.py",
        "pieces.append((head, start, size))", "pieces.append((head, 0, size))",
        "tests/ops/test_multi_horizon_linear.py -k few_columns",
    ),
    Fault(
        "shares are summed without the conditioning sums", "kernel",
        "mfwm_kernels/triton/multi_horizon_linear_heads.py",
        "share[:, None] * tl.load(sums + offsets, mask, 0)", "share[:, None]",
        values_of("multi_horizon_linear-triton-bfloat16"),
    ),
    Fault(
        "a launch more than is needed", "launches", "mfwm_kernels/triton/multi_horizon_linear.py",
        "total = heads_partial.sum(0)", "total = heads_partial.sum(0).clone()",
        "tests/test_launch_counts.py -k 'linear and not cross'",
    ),
    # ---- gradients
    Fault(
        "the gradient of a pair's near side is too large", "gradient", "csrc/cuda/multi_horizon_loss_patches.cu",
        "1 << 2 * (far.level - h.level)", "1 << (far.level - h.level)",
        emulated("multi_horizon_loss-float32-start"),
    ),
    Fault(
        "the gradient of a square lacks its 2", "gradient", "csrc/cpu/loss_tile.h",
        "LossKind::mse ? 2 : 1", "LossKind::mse ? 1 : 1",
        values_of("multi_horizon_loss-cpu-float32"),
    ),
    Fault(
        "the first action gets no gradient", "gradient", "csrc/cpu/action_window_sum.cpp",
        "lag < op.offsets[i] && lag <= m;", "lag < op.offsets[i] && lag < m;",
        values_of("action_window_sum-cpu-float32"),
    ),
    Fault(
        "smoothed labels have no gradient", "gradient", "csrc/cpu/multi_horizon_linear_cross_entropy.cpp",
        "e[k] = e[k] * factor - shift;", "e[k] = e[k] * factor;",
        values_of("multi_horizon_linear_cross_entropy-cpu-float32"),
    ),
    Fault(
        "a small call's position weight does not reach the gradient", "gradient",
        "csrc/cpu/multi_horizon_linear_cross_entropy_small.cpp",
        "i * op.horizon_weights.stride[0]) * weight /", "i * op.horizon_weights.stride[0]) /",
        "tests/ops/test_small_calls.py -k columns_of_ids",
    ),
    Fault(
        "the norm of a small call has no gradient of its own", "gradient", "csrc/cpu/mtp_combine.cpp",
        "g[d] = (g[d] - x[d] * along) * scales[h];", "g[d] = g[d] * scales[h];",
        "tests/ops/test_small_calls.py -k 'threshold and mtp_combine'",
    ),
    Fault(
        "a position weight does not reach the gradient", "gradient",
        "mfwm_kernels/gemm/token_targets.py",
        "all_scales * weights", "all_scales",
        values_of("multi_horizon_linear_cross_entropy-cpu-float32"),
    ),
    Fault(
        "a pair teaches its near side's bias nothing", "gradient",
        "mfwm_kernels/gemm/multi_horizon_linear_cross_entropy.py",
        "heads.sum_biases([near_part], near)", "pass",
        values_of("multi_horizon_linear_cross_entropy-cpu-float32"),
    ),
    Fault(
        "of targets on one state the last alone has a softmax", "gradient",
        "csrc/cpu/multi_horizon_linear_cross_entropy.cpp",
        "scale += static_cast<const C*>(op.scales.data)[x];", "scale = static_cast<const C*>(op.scales.data)[x];",
        "tests/ops/test_shared_states.py -k 'changes_nothing and cpu'",
    ),
    Fault(
        "a second target on a state has no softmax", "gradient",
        "mfwm_kernels/triton/multi_horizon_linear_cross_entropy.py",
        "row_factor, learns = tl.sum(factor, 0),",
        "row_factor, learns = tl.sum(tl.where(tl.arange(0, ENTRIES) == 0, factor, 0.0), 0),",
        "tests/ops/test_shared_states.py -k 'changes_nothing and triton'",
    ),
    Fault(
        "a target that several horizons have is theirs once", "gradient",
        "mfwm_kernels/triton/multi_horizon_linear_cross_entropy.py",
        "shares_of(target, share, ids, first_id, square, ENTRIES)", "share[:, None]",
        "tests/ops/test_shared_states.py -k 'same_id and triton'",
    ),
    Fault(
        "the loss of a shared state is another horizon's", "kernel", "mfwm_kernels/gemm/token_targets.py",
        "[:, args.leaders[:i].count(leader)]", "[:, 0]",
        "tests/ops/test_shared_states.py -k 'changes_nothing and cpu'",
    ),
    Fault(
        "views of the same memory share a gradient", "dispatch",
        "mfwm_kernels/ops/multi_horizon_linear_cross_entropy.py",
        "if all(field[j] is field[i] for field", "if all(field[j].data_ptr() == field[i].data_ptr() for field",
        "tests/ops/test_shared_states.py -k 'views_of_the_same_memory and cpu'",
    ),
    Fault(
        "the softcap comes before the prediction", "kernel",
        "mfwm_kernels/triton/multi_horizon_linear_cross_entropy.py",
        "load_biased(logits, start, biases, bias_start, v, in_row), v, in_row, AXIS",
        "load_row(logits, start, biases, bias_start, v, in_row, softcap, SOFTCAP), v, in_row, AXIS",
        "tests/ops/test_multi_horizon_linear_cross_entropy.py -k 'test_predictions and triton'",
    ),
    Fault(
        "an ignored id teaches too", "kernel", "mfwm_kernels/gemm/token_targets.py",
        "known = torch.where(args.token_mask[..., None], -1, ids)",
        "known = torch.where(args.token_mask[..., None], -1, ids.clamp_min(0))",
        "tests/ops/test_multi_horizon_linear_cross_entropy.py -k 'true_ids_teach and cpu'",
    ),
    Fault(
        "a mask excludes no target of a kernel", "kernel", "mfwm_kernels/triton/token_targets.py",
        "id = tl.where(is_trained, id, -1)", "id = tl.where(is_trained, id, id)",
        "tests/ops/test_token_targets.py -k targets_of_a_launch",
    ),
    Fault(
        "the near side of a pair counts at another position", "kernel", "mfwm_kernels/triton/token_consistency.py",
        "weight_strides, b, n + APART, both, NEAR", "weight_strides, b, n, both, NEAR",
        "tests/ops/test_token_targets.py -k pairs_of_a_launch",
    ),
    Fault(
        "the other side of a pair is detached", "gradient", "mfwm_kernels/ops/multi_horizon_loss.py",
        'if args.detach == "near" else', 'if args.detach == "far" else',
        values_of("multi_horizon_loss-cpu-float32"),
    ),
    Fault(
        "the gradient of the z-loss lacks its 2", "gradient",
        "mfwm_kernels/triton/multi_horizon_linear_cross_entropy.py",
        "(1 + 2 * z_loss * log_sum)", "(1 + z_loss * log_sum)",
        values_of("multi_horizon_linear_cross_entropy-triton-float32"),
    ),
    Fault(
        "NaN that does not count comes back in the gradient", "gradient", "mfwm_kernels/ops/multi_horizon_loss.py",
        "difference = torch.where(mask, difference, 0)", "pass",
        "tests/ops/test_multi_horizon_loss.py -k 'may_be_nan and reference'",
    ),
    # ---- argument checks
    Fault(
        "an infinite number passes", "arguments", "mfwm_kernels/arguments.py",
        "if not magnitude <= LARGEST_FLOAT:", "if magnitude != magnitude:",
        "tests/test_arguments.py -k malformed",
    ),
    Fault(
        "segment_ids of any shape pass", "arguments", "mfwm_kernels/arguments.py",
        'shape("segment_ids", value, (batch, columns), letters)', "pass",
        "tests/test_arguments.py -k malformed",
    ),
    Fault(
        "tensors on two devices pass", "arguments", "mfwm_kernels/arguments.py",
        "if value.device != other.device:", "if False:",
        "tests/test_arguments.py -k malformed",
    ),
    Fault(
        "True is an integer", "arguments", "mfwm_kernels/arguments.py",
        "(isinstance(value, Integral) and not isinstance(value, bool))", "isinstance(value, Integral)",
        "tests/test_arguments.py -k malformed",
    ),
    Fault(
        "a negative id is used as an index", "arguments", "mfwm_kernels/ops/token_ids.py",
        "((ids < 0) | (ids >= vocabulary))", "(ids >= vocabulary)",
        "tests/ops/test_token_targets.py -k out_of_range",
    ),
    # ---- dispatch, autograd and torch's transforms
    Fault(
        "a pending negation is lost", "dispatch", "mfwm_kernels/transforms.py",
        "negated |= value.is_neg()", "pass",
        "tests/test_transforms.py -k 'pending_negation and cpu'",
    ),
    Fault(
        "a kernel runs under torch.func", "dispatch", "mfwm_kernels/transforms.py",
        "or _functorch.maybe_current_level() is not None", "",
        "tests/test_transforms.py -k 'torch_func and cpu'",
    ),
    Fault(
        "autocast rounds fp64", "dispatch", "mfwm_kernels/dtypes.py",
        " or tensor.dtype == torch.float64:", ":",
        "tests/ops/test_mtp_combine.py -k autocast",
    ),
    Fault(
        "gradients are scaled again by a second backward", "dispatch", "mfwm_kernels/autograd.py",
        "stored, ctx.gradients = ctx.gradients, None", "stored = ctx.gradients",
        "tests/test_ops.py -k 'backward_again and multi_horizon_loss-cpu'",
    ),
    Fault(
        "fp16 gradients are stored in fp16", "dispatch", "mfwm_kernels/dtypes.py",
        "return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype", "return leaf.dtype",
        "tests/ops/test_multi_horizon_loss.py -k 'loss_scale and not compiled'",
    ),
    # ---- layers of the model
    Fault(
        "attention reaches one frame past the window", "model", "python/mfwm/models/blocks.py",
        "max(0, stored - self.window + 1)", "max(0, stored - self.window)",
        "tests/test_rollout.py -k 'a_cache_changes_nothing or a_window_rolls_on'",
    ),
    Fault(
        "attention reaches another episode", "model", "python/mfwm/models/blocks.py",
        "return same & causal_mask(", "return causal_mask(",
        "tests/test_causality.py -k segments_do_not_mix",
    ),
    Fault(
        "a real frame in between is one too late", "model", "python/mfwm/models/branches.py",
        "device=x_BVHWD.device) + lag)", "device=x_BVHWD.device) + lag + 1)",
        "tests/test_causality.py tests/test_model.py -k 'causality or frames_chain'",
    ),
    Fault(
        "the placebo's far horizons reach the trunk", "model", "python/mfwm/models/world_model.py",
        "hidden = hidden.detach()", "hidden = hidden.clone()",
        "tests/test_training_options.py -k placebo_gives",
    ),
    Fault(
        "noisy frames are the targets of changes", "model", "python/mfwm/models/heads.py",
        "differences = [a - b for", "differences = [b - a for",
        "tests/test_training_options.py -k context_noise_changes",
    ),
    Fault(
        "frames are fed back across episodes", "model", "python/mfwm/training/world_model.py",
        "inside = segment_ids[:, 1 : count + 1] == segment_ids[:, :count]",
        "inside = segment_ids[:, :count] == segment_ids[:, :count]",
        "tests/test_training_options.py -k rollout_loss_sees",
    ),
    Fault(
        "annealed weights stay", "model", "python/mfwm/training/world_model.py",
        "return [1.0 if rank == 0 else 1 - progress for", "return [1.0 if rank == 0 else 1.0 for",
        "tests/test_training_options.py -k schedule",
    ),
    Fault(
        "the weights of horizons are ignored", "model", "python/mfwm/models/heads.py",
        "weights: Any = config.horizon_weights if", "weights: Any = None if",
        "tests/test_model.py -k weighted_as_configured",
    ),
    Fault(
        "masked positions see their own action", "model", "python/mfwm/models/world_model.py",
        "F.pad(taken_BVD, (0, 0, 1, 0))", "F.pad(taken_BVD, (0, 0, 0, 1))",
        "tests/test_rollout.py -k masked_positions",
    ),
    Fault(
        "surgery where gradients agree", "model", "python/mfwm/models/balance.py",
        ".clamp_max(0)", ".clamp_min(0)",
        "tests/test_balance.py -k surgery_scale",
    ),
    # ---- data: what is read, and that nothing is lost
    Fault(
        "the old set is deleted before the new one is there", "data", "python/mfwm/data/place.py",
        "self.target.rename(old)", "shutil.rmtree(self.target)",
        "tests/test_data_safety.py -k killed_at_a_rename",
    ),
    Fault(
        "an overwrite deletes what is not a set's", "data", "python/mfwm/data/place.py",
        "for path in foreign_files(self.target):", "for path in ():",
        "tests/test_data_safety.py -k nothing_but_a_replay_buffer",
    ),
    Fault(
        "half a set is published", "data", "python/mfwm/data/replay_writer.py",
        "if kind is None and self.episodes:", "if self.episodes:",
        "tests/test_data_safety.py -k 'failed_overwrite or block_raised'",
    ),
    Fault(
        "an episode ends before its frames are written", "data", "python/mfwm/data/replay_writer.py",
        "for name, values in rows.items():",
        "for name, values in [(ENDS, None), *rows.items()]:\n"
        "                if name == ENDS:\n"
        "                    self._write(ENDS, self.episodes, np.array([self.frames + len(video)]))\n"
        "                    continue",
        "tests/test_data_safety.py -k append_that_failed",
    ),
    Fault(
        "held-out levels are trained on", "data", "python/mfwm/data/replay.py",
        "return np.flatnonzero(~validation),", "return np.arange(len(validation)),",
        "tests/test_data.py -k levels_are_split",
    ),
    Fault(
        "actions are those of the frame before", "data", "python/mfwm/data/replay.py",
        "self.replay.action[frames_BT]", "self.replay.action[np.maximum(frames_BT - 1, 0)]",
        "tests/test_data.py -k actions_of_a_clip",
    ),
    # ---- checkpoints, and runs that are resumed
    Fault(
        "a resumed run begins the data again", "resume", "python/mfwm/training/trainer.py",
        "sampler.batches(first, last, config.workers)", "sampler.batches(0, last - first, config.workers)",
        "tests/test_training.py -k 'resumed_run and float32'",
    ),
    Fault(
        "random numbers do not follow from the step", "resume", "python/mfwm/training/trainer.py",
        "torch.manual_seed(seed_of(config.seed, step, self.trainer.rank))", "pass",
        "tests/test_training.py -k with_random_numbers",
    ),
    Fault(
        "the moving average begins anew", "resume", "python/mfwm/training/trainer.py",
        'state["average"] = self.average.averages', 'state["average"] = dict(self.average.weights)',
        "tests/test_training.py -k moving_average",
    ),
    Fault(
        "rows of steps to come stay in the log", "resume", "python/mfwm/training/run_log.py",
        'if row["step"] < first]', 'if row["step"] <= first]',
        "tests/test_training.py -k run_again",
    ),
    Fault(
        "one checkpoint too few is kept", "resume", "python/mfwm/training/checkpoints.py",
        "self.steps()[: -self.keep]", "self.steps()[: 1 - self.keep]",
        "tests/test_training.py -k newest_checkpoints",
    ),
    Fault(
        "a file is written in its place", "resume", "python/mfwm/training/checkpoints.py",
        "with written_beside(path) as unfinished:", "for unfinished in [path]:",
        "tests/test_run_safety.py -k whole_or_as_it_was",
    ),
    # ---- evaluation
    Fault(
        "a held-out clip is measured twice", "evaluation", "python/mfwm/evaluation/held_out.py",
        "size=min(count, len(self.clips)), replace=False", "size=min(count, len(self.clips)), replace=True",
        "tests/test_evaluation.py -k held_out_clips",
    ),
    Fault(
        "levels that were trained on are measured", "evaluation", "python/mfwm/evaluation/held_out.py",
        "self.trained, self.episodes = split_levels(", "self.episodes, self.trained = split_levels(",
        "tests/test_evaluation.py -k held_out_clips",
    ),
    Fault(
        "persistence knows the frame to come", "evaluation", "python/mfwm/evaluation/closed_loop.py",
        "persistence = truth[:, CONTEXT - 1 : CONTEXT]", "persistence = truth[:, CONTEXT : CONTEXT + 1]",
        "tests/test_evaluation.py -k rollouts_are_measured",
    ),
    Fault(
        "the two sides of a difference are other clips", "evaluation", "python/mfwm/metrics/intervals.py",
        "v[draw].mean(1) for v in values", "v[np.roll(draw, i, 0)].mean(1) for i, v in enumerate(values)",
        "tests/test_evaluation.py -k interval",
    ),
    Fault(
        "the peak is not squared", "evaluation", "python/mfwm/metrics/quality.py",
        "np.log10(PEAK**2 /", "np.log10(PEAK /",
        "tests/test_evaluation.py -k psnr",
    ),
    Fault(
        "tokens are compared one frame off", "evaluation", "python/mfwm/evaluation/tokens.py",
        "truth, before = ids[:, offset : offset + end]", "truth, before = ids[:, offset - 1 : offset - 1 + end]",
        "tests/test_token_path.py -k bits_are_the_loss",
    ),
]  # fmt: skip
KINDS = list(dict.fromkeys(fault.kind for fault in FAULTS))
