"""The seeded bugs of `python -m tests.mutate`, each with the test that must kill it."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    function: str  # by its name in the file, as "Batch.advance"; "" for what stands in none
    old: str  # some of its operators and operands in a row, whatever lines and spaces they are written with
    new: str
    test: str  # below tests/, as pytest selects it; every parameter of it may kill
    interpreted: bool = True  # whether that test runs Triton kernels in their interpreter, or is an ordinary one


NORM, LOSS, MLP = "kernels/layernorm.py", "kernels/cross_entropy.py", "kernels/mlp.py"
HEAD, TILES = "kernels/attention.py", "kernels/attention_tiles.py"
GELU, EMBEDDING = "kernels/gelu.py", "kernels/embedding.py"
BACK, DECODE = "kernels/attention_backward.py", "kernels/decode.py"
WIDTHS, LENGTHS = "test_layernorm.py::test_widths", "test_attention.py::test_lengths"
NORM_STRIDES, HEAD_STRIDES = (
    "test_layernorm.py::test_strides_change_no_bit",
    "test_attention.py::test_strides_change_no_bit",
)
RATIOS, DROPS = (
    "test_attention.py::test_every_ratio_of_tiles",
    "test_layernorm.py::test_dropout_drops_what_the_reference_drops",
)
LARGE_MEAN, ENTROPY = (
    "test_layernorm.py::test_a_large_mean_costs_no_digits",
    "test_cross_entropy.py::test_loss_and_gradients",
)
ATTENTION_DROPS, KEY_MASK, DOCUMENTS = (
    "test_attention_masks.py::test_dropout_drops_what_the_reference_drops",
    "test_attention_masks.py::test_key_mask",
    "test_attention_masks.py::test_documents",
)
SKIPS, OTHERS = (
    "test_attention_masks.py::test_foreign_tiles_are_not_walked_over",
    "test_attention_masks.py::test_another_document_changes_no_bit",
)
GROUPS, CACHE = "test_attention_masks.py::test_grouped_heads", "test_decode.py::test_lengths"
MLP_WIDTHS, POINTS = "test_mlp.py::test_widths", "test_mlp.py::test_gelu_point_by_point"
WIDE = "test_layernorm.py::test_wide_rows"
FEW = "test_few_rows.py::"
RUNS = "test_embedding.py::test_runs_of_one_token"
FALLBACK, FALLBACK_MLP = "test_pytorch.py::", "test_mlp_fallback.py::"
FALLBACK_LOSS = "test_loss.py::test_loss_and_gradients"
RESUMED = "test_resume.py::test_resumed_is_uninterrupted_to_the_bit"
WORLD, CHECKPOINT = "test_distributed.py::test_two_processes_train_what_one_does", "fastgpt/training/checkpoint.py"
PARTS, SWAP, FILES = "fastgpt/families/__init__.py", "fastgpt/swap/__init__.py", "fastgpt/weights/files.py"
GPT2, RASCHKA = "fastgpt/families/gpt2.py", "fastgpt/families/book.py"
CHILD, PART = "test_swap_parts.py::test_a_changed_child_is_called", "test_swap_parts.py::test_a_changed_part_is_called"
GENERATION, SAMPLED, BATCHED = "test_generation.py::", "test_sampling.py::", "test_batch.py::"
ALONE = "test_decoder.py::test_one_row_alone_is_decoded_as_in_a_batch"
CACHED, DRAWN, STOPS = (
    GENERATION + "test_greedy_with_the_cache_is_greedy_without_it",
    SAMPLED + "test_draws_follow_the_softmax_with_its_filters",
    SAMPLED + "test_each_row_stops_by_itself",
)
DECODER, ATTENDED, SAMPLING, BATCH = (
    "fastgpt/generation/decoder.py",
    "fastgpt/generation/cache.py",
    "fastgpt/generation/sampling.py",
    "fastgpt/generation/batch.py",
)
LINEARS, READ, MODEL = "fastgpt/ops/cpu/linears.py", "fastgpt/generation/view.py", "fastgpt/model.py"
KEPT, HOOKED = "test_decoder_changes.py::", "test_model_parts.py::test_a_part_with_a_hook_is_called"
SPECULATIVE, STEPS, MONITOR = (
    "fastgpt/generation/speculative.py",
    "fastgpt/ops/decoding.py",
    "fastgpt/training/monitor.py",
)
SHOWN, HOLED, OFFLINE = "test_showing.py::", "test_holes.py::", "test_offline.py::"
WORLDLY, CHANGED, FORMS = "test_swap_world.py::", "test_swap_classes.py::", "test_swap_forms.py::"
TOLD = SHOWN + "test_what_it_raises_is_told_in_a_line_and_training_goes_on"
UNDRAWN = HOLED + "test_an_id_that_stands_for_nothing_is_not_drawn"
JUDGED = "test_judges.py::"

MUTANTS = [
    # LayerNorm
    Mutant("eps outside the root", NORM, "_layer_norm_fwd_kernel", "/ tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)", "/ (tl.sqrt(tl.sum(centred * centred, axis=1) / C) + eps)", "test_layernorm.py::test_eps_is_heard"),
    Mutant("eps fixed", NORM, "_layer_norm_fwd_kernel", "/ C + eps)", "/ C + 1e-5)", "test_layernorm.py::test_eps_is_heard"),
    Mutant("unbiased variance", NORM, "_layer_norm_fwd_kernel", "centred, axis=1) / C + eps", "centred, axis=1) / (C - 0.999) + eps", WIDTHS),
    Mutant("variance over the block", NORM, "_layer_norm_fwd_kernel", "centred, axis=1) / C + eps", "centred, axis=1) / BLOCK_C + eps", WIDTHS),
    Mutant("mean over the block", NORM, "_layer_norm_fwd_kernel", "mean = tl.sum(s, axis=1) / C", "mean = tl.sum(s, axis=1) / BLOCK_C", LARGE_MEAN),
    Mutant("tail left in the variance", NORM, "_layer_norm_fwd_kernel", "centred = tl.where(in_cols[None, :], centred - correction[:, None], 0.0)", "centred = centred - correction[:, None] - tl.where(in_cols[None, :], 0.0, 1.0)", WIDTHS),
    Mutant("no correction of the mean", NORM, "_layer_norm_fwd_kernel", "correction = tl.sum(centred, axis=1) / C", "correction = tl.sum(centred, axis=1) * 0.0", LARGE_MEAN),
    Mutant("no correction in the backward", NORM, "_normed", "((s - mean[:, None]) - correction[:, None])", "(s - mean[:, None])", LARGE_MEAN),
    Mutant("mean and correction joined", NORM, "_normed", "((s - mean[:, None]) - correction[:, None])", "(s - (mean + correction)[:, None])", LARGE_MEAN),
    Mutant("avg(g n) dropped", NORM, "_layer_norm_bwd_kernel", "- n * avg_gn[:, None]", "", WIDTHS),
    Mutant("avg(g) dropped", NORM, "_layer_norm_bwd_kernel", "(g - avg_g[:, None])", "g", WIDTHS),
    Mutant("rstd dropped from ds", NORM, "_layer_norm_bwd_kernel", "ds = rstd[:, None] * (", "ds = (", WIDTHS),
    Mutant("weight dropped from g", NORM, "_layer_norm_bwd_kernel", "g = dy * _load_row(weight_ptr, C, ACC, BLOCK_C)", "g = dy", WIDTHS),
    Mutant("dsum not added", NORM, "_layer_norm_bwd_kernel", "if HAS_DSUM:", "if False:", WIDTHS),
    Mutant("wide: dropout's columns counted anew in each block", NORM, "_layer_norm_sums_kernel", "tl.load(seed_ptr), rows, first, 0, _SITE", "tl.load(seed_ptr), rows, 0, 0, _SITE", WIDE),
    Mutant("wide: only the first program's rows", NORM, "_layer_norm_sums_kernel", "for start in range(program * BLOCK_M, M, programs * BLOCK_M):\n        rows = start + tl.arange(0, BLOCK_M)\n        mask = (rows < M)[:, None] & (cols < C)[None, :]\n        rows64", "for start in range(program * BLOCK_M, program * BLOCK_M + 1, BLOCK_M):\n        rows = start + tl.arange(0, BLOCK_M)\n        mask = (rows < M)[:, None] & (cols < C)[None, :]\n        rows64", WIDE),
    Mutant("wide: dx_bias of ds", NORM, "_layer_norm_sums_kernel", "            dx_bias += dx\n", "            dx_bias += tl.load(ds_ptr + rows64 * C + cols64, mask, 0.0).to(ACC)\n", WIDE),
    Mutant("wide: dx not written", NORM, "_wide_sums", "        NEEDS_DX=dx.numel() > 0,", "        NEEDS_DX=False,", WIDE),
    Mutant("residual not added", NORM, "_layer_norm_fwd_kernel", "s += _load_rows(residual_ptr", "s += 0 * _load_rows(residual_ptr", WIDTHS),
    Mutant("x_bias not added", NORM, "_layer_norm_fwd_kernel", "s += _load_row(x_bias_ptr", "s += 0 * _load_row(x_bias_ptr", WIDTHS),
    Mutant("s normalised before it is rounded", NORM, "_layer_norm_fwd_kernel", "s = rounded.to(ACC)", "s = s", WIDTHS),
    Mutant("last rows skipped", NORM, "_layer_norm_bwd_kernel", "range(program * BLOCK_M, M,", "range(program * BLOCK_M, M - BLOCK_M,", "test_layernorm.py::test_row_counts"),
    Mutant("rows walked twice as fast", NORM, "_layer_norm_bwd_kernel", "M, programs * BLOCK_M, num_stages", "M, 2 * programs * BLOCK_M, num_stages", "test_layernorm.py::test_row_counts"),
    Mutant("wide rows walked twice as fast", NORM, "_layer_norm_sums_kernel", "M, programs * BLOCK_M):", "M, 2 * programs * BLOCK_M):", WIDE),
    Mutant("dy read as if contiguous", NORM, "_layer_norm_bwd_kernel", "_load_rows(dy_ptr, rows, stride_gm,", "_load_rows(dy_ptr, rows, C,", NORM_STRIDES),
    Mutant("dsum read with dy's strides", NORM, "_layer_norm_bwd_kernel", "_load_rows(dsum_ptr, rows, stride_dm,", "_load_rows(dsum_ptr, rows, stride_gm,", "test_layernorm.py::test_a_gradient_for_one_output_alone"),
    Mutant("y stored past the row", NORM, "_store_rows", "values.to(pointer.dtype.element_ty), (rows < M)[:, None] & (cols < C)[None, :])", "values.to(pointer.dtype.element_ty), (rows < M)[:, None] & (cols >= 0)[None, :])", WIDTHS),
    Mutant("partials shared", NORM, "_layer_norm_bwd_kernel", "offsets = program * C + cols", "offsets = cols", "test_layernorm.py::test_row_counts"),
    Mutant("dx not dropped", NORM, "_layer_norm_bwd_kernel", "dx = tl.where(keep, ds * keep_scale, 0.0)", "dx = ds * keep_scale", DROPS),
    Mutant("kept not scaled", NORM, "_layer_norm_fwd_kernel", "s = tl.where(keep, s * keep_scale, 0.0)", "s = tl.where(keep, s, 0.0)", DROPS),
    Mutant("words in another order", "kernels/philox.py", "keep_mask", "tl.interleave(w0, w2), tl.interleave(w1, w3)", "tl.interleave(w0, w1), tl.interleave(w2, w3)", DROPS),
    Mutant("seed ignored", "kernels/philox.py", "keep_mask", "tl.philox(seed,", "tl.philox(0,", DROPS),
    Mutant("threshold itself dropped", "kernels/philox.py", "keep_mask", "tl.int64) >= threshold", "tl.int64) > threshold", "test_layernorm.py::test_a_word_at_the_threshold_is_kept"),
    # attention
    Mutant("no scale", HEAD, "_forward", "qk_scale=scale * math.log2(math.e)", "qk_scale=math.log2(math.e)", LENGTHS),
    Mutant("a query does not see itself", TILES, "sees", "seen = k <= q", "seen = k < q", LENGTHS),
    Mutant("a query sees the next key", TILES, "sees", "(first_query + (keys - queries) - first_key)", "(first_query + (keys - queries) - first_key + 1)", LENGTHS),
    Mutant("causal aligned at the start", TILES, "sees", "(first_query + (keys - queries) - first_key)", "(first_query - first_key)", "test_attention.py::test_fewer_queries_than_keys_sit_at_the_end"),
    Mutant("one tile too many unmasked", HEAD, "_attention_fwd_kernel", "// BLOCK_N * BLOCK_N  # keys in whole tiles", "// BLOCK_N * BLOCK_N + BLOCK_N  # keys in whole tiles", RATIOS),
    Mutant("sum not rescaled", HEAD, "_attend", "acc * rescale[:, None]", "acc", LENGTHS),
    Mutant("row sum not rescaled", HEAD, "_attend", "l * rescale + ", "l + ", LENGTHS),
    Mutant("no running maximum", HEAD, "_attend", "m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)", "m_new = tl.zeros_like(m)", "test_attention.py::test_small_and_large_scores"),
    Mutant("lse in base e", HEAD, "_attention_fwd_kernel", "m + tl.log2(l)", "m + tl.log(l)", LENGTHS),
    Mutant("lse without the maximum", HEAD, "_attention_fwd_kernel", "m + tl.log2(l)", "tl.log2(l)", LENGTHS),
    Mutant("Δ missing in dk", BACK, "_dkdv_step", "dst = pt * (dpt - delta[None, :])", "dst = pt * dpt", LENGTHS),
    Mutant("Δ missing in dq", BACK, "_dq_step", "ds = p * (dp - delta[:, None])", "ds = p * dp", LENGTHS),
    Mutant("Δ added", BACK, "_dq_step", "ds = p * (dp - delta[:, None])", "ds = p * (dp + delta[:, None])", LENGTHS),
    Mutant("dk not scaled", BACK, "_attention_dkdv_kernel", "dk * scale", "dk", LENGTHS),
    Mutant("dq not scaled", BACK, "_attention_dq_kernel", "dq * scale", "dq", LENGTHS),
    Mutant("diagonal skipped in dkdv", BACK, "_attention_dkdv_kernel", "diagonal = tl.cdiv(tl.maximum(below - begin, 0), BLOCK_M)", "diagonal = 0", LENGTHS),
    Mutant("below the diagonal skipped in dkdv", BACK, "_attention_dkdv_kernel", "range(below, whole, BLOCK_M)", "range(below, below, BLOCK_M)", LENGTHS),
    Mutant("queries past the last whole tile skipped in dkdv", BACK, "_attention_dkdv_kernel", "diagonal + (whole < end)", "diagonal", LENGTHS),
    Mutant("half of Δ left for dk and dv", BACK, "_attention_dq_kernel", "tl.store(delta_ptr + plane.to(tl.int64) * queries + rows, delta", "tl.store(delta_ptr + plane.to(tl.int64) * queries + rows, 0.5 * delta", LENGTHS),
    Mutant("diagonal unmasked in the forward", HEAD, "_attend", "not WHOLE or start >= below", "not WHOLE or start > below", LENGTHS),
    Mutant("last tile of keys left out", HEAD, "_attention_fwd_kernel", "begin = whole", "begin = end", LENGTHS),
    Mutant("dv overwritten", BACK, "_dkdv_step", "do, dv, input_precision", "do, input_precision", RATIOS),
    Mutant("do read with q's strides in dq", BACK, "_attention_dq_kernel", "do = load_rows(do_ptr, first, stride_gt, stride_gd,", "do = load_rows(do_ptr, first, stride_qt, stride_qd,", HEAD_STRIDES),
    Mutant("batch and head swapped", HEAD, "_attention_fwd_kernel", "batch, head, first = plane // heads, plane % heads, tile", "batch, head, first = plane % heads, plane // heads, tile", "test_attention.py::test_heads_and_batches"),
    Mutant("TF32 where IEEE was promised", "kernels/launch.py", "matmul_precision", 'return "tf32" if torch', 'return "tf32" if True or torch', LENGTHS),
    Mutant("probabilities in float16", HEAD, "_attend", "tl.dot(p.to(v.dtype), v,", "tl.dot(p.to(tl.float16).to(v.dtype), v,", LENGTHS),
    # attention's dropout, masks, documents and grouped heads
    Mutant("another mask in the backward", BACK, "_dkdv_step", "tl.trans(keep_mask(seed, rows, first, plane", "tl.trans(keep_mask(seed, rows, first, plane + 1", ATTENTION_DROPS),
    Mutant("dP not dropped in dq", BACK, "_dq_step", "dp = tl.where(keep, dp * keep_scale, 0.0)", "dp = dp * keep_scale", ATTENTION_DROPS),
    Mutant("dP not scaled in dkdv", BACK, "_dkdv_step", "dpt = tl.where(keep, dpt * keep_scale, 0.0)", "dpt = tl.where(keep, dpt, 0.0)", ATTENTION_DROPS),
    Mutant("dv not dropped", BACK, "_dkdv_step", "kept = tl.where(keep, pt * keep_scale, 0.0)", "kept = pt * keep_scale", ATTENTION_DROPS),
    Mutant("dropout before the row sum", HEAD, "_attend", "    l = l * rescale + tl.sum(p, axis=1)\n    if seed is not None:\n        p = tl.where(keep_mask(seed, rows, start, plane, ATTENTION_SITE, threshold, BLOCK_M, BLOCK_N), p, 0.0)\n", "    if seed is not None:\n        p = tl.where(keep_mask(seed, rows, start, plane, ATTENTION_SITE, threshold, BLOCK_M, BLOCK_N), p, 0.0)\n    l = l * rescale + tl.sum(p, axis=1)\n", ATTENTION_DROPS),
    Mutant("kept probabilities not scaled", HEAD, "_attention_fwd_kernel", "o *= keep_scale", "o *= 1.0", ATTENTION_DROPS),
    Mutant("one mask for all heads", HEAD, "_attend", "seed, rows, start, plane, ATTENTION_SITE", "seed, rows, start, 0, ATTENTION_SITE", "test_attention_masks.py::test_the_same_seed_keeps_the_same_on_both_backends"),
    Mutant("LayerNorm's site", TILES, "", "ATTENTION_SITE = tl.constexpr(0)", "ATTENTION_SITE = tl.constexpr(1)", ATTENTION_DROPS),
    Mutant("columns counted from the tile", HEAD, "_attend", "seed, rows, start, plane, ATTENTION_SITE", "seed, rows, 0, plane, ATTENTION_SITE", ATTENTION_DROPS),
    Mutant("hidden keys seen", TILES, "sees", "    if mask_ptr is not None:\n        seen = seen", "    if False:\n        seen = seen", KEY_MASK),
    Mutant("hidden keys read", TILES, "open_keys", "there = there & tl.load(mask_ptr + cols, there, False).to(tl.int1)", "there = there", "test_attention_masks.py::test_what_a_key_mask_hides_changes_no_bit"),
    Mutant("rows that see nothing divided by zero", HEAD, "_attention_fwd_kernel", "o = tl.where(l[:, None] == 0.0, 0.0, o)", "o = o", KEY_MASK),
    Mutant("no guard before the first key", HEAD, "_attend", 'base = tl.where(m_new == float("-inf"), 0.0, m_new)', "base = m_new", KEY_MASK),
    Mutant("first row's key mask for all", HEAD, "_attention_fwd_kernel", "mask_ptr += batch.to(tl.int64) * keys", "mask_ptr += 0", KEY_MASK),
    Mutant("other documents seen", TILES, "sees", "    if ids_ptr is not None:\n        seen = seen", "    if False:\n        seen = seen", DOCUMENTS),
    Mutant("documents compared by the tile's lowest", TILES, "_spans_kernel", "(lowest <= ids) & (ids <= highest)", "(ids == lowest)", DOCUMENTS),
    Mutant("span one tile short", HEAD, "_attention_fwd_kernel", "begin, end = begin // BLOCK_N * BLOCK_N, tl.minimum(end, stop)", "begin, end = begin // BLOCK_N * BLOCK_N, tl.minimum(end, stop - BLOCK_N)", DOCUMENTS),
    Mutant("foreign tiles walked over", HEAD, "_attention_fwd_kernel", "begin, end = begin // BLOCK_N * BLOCK_N, tl.minimum(end, stop)", "begin = 0", SKIPS),
    Mutant("foreign tiles walked over in dkdv", BACK, "_attention_dkdv_kernel", "_, end = span_of(spans_ptr, batch, tile, tiles)", "end = queries", SKIPS),
    Mutant("NaN of another document", TILES, "open_keys", "there = there & (poison == 0.0)", "there = there", OTHERS),
    Mutant("NaN of the own document hidden", HEAD, "_attend", "s += poison[None, :]", "s += 0.0", "test_attention_masks.py::test_nan_in_the_own_document_is_heard"),
    Mutant("query heads dealt round", HEAD, "_attention_fwd_kernel", "k_ptr = head_of(k_ptr, batch, head // group,", "k_ptr = head_of(k_ptr, batch, head % (heads // group),", GROUPS),
    Mutant("dk of the first head of a group", BACK, "_attention_dkdv_kernel", "range(group)", "range(1)", GROUPS),
    # decode
    Mutant("one empty slot read", DECODE, "_decode_kernel", "tl.minimum(tl.load(lengths_ptr + batch), slots).to(tl.int32)\n    begin", "tl.minimum(tl.load(lengths_ptr + batch) + 1, slots).to(tl.int32)\n    begin", CACHE),
    Mutant("all new tokens see the last", DECODE, "_decode_kernel", "last = length - steps + step", "last = length - 1 + 0 * step", "test_decode.py::test_groups_and_steps"),
    Mutant("splits merged without their maximum", DECODE, "_merge_kernel", "weights, rescale = tl.exp2(lse - base), tl.exp2(m - base)", "weights, rescale = tl.exp2(lse * 0.0), tl.exp2(m - m)", CACHE),
    Mutant("last split left out", DECODE, "_merge_kernel", "range(0, tl.cdiv(length, SPLIT), BLOCK_S)", "range(0, length // SPLIT, BLOCK_S)", CACHE),
    Mutant("splits of a row in one slot", DECODE, "_decode_kernel", "* SPLITS + split\n", "* SPLITS\n", CACHE),
    Mutant("a length past the cache believed", DECODE, "_decode_kernel", "tl.minimum(tl.load(lengths_ptr + batch), slots).to(tl.int32)\n    begin", "tl.minimum(tl.load(lengths_ptr + batch), slots + 16).to(tl.int32)\n    begin", "test_decode.py::test_a_length_past_the_cache_reads_nothing_past_it"),
    Mutant("empty slots seen as zeros", DECODE, "_decode_kernel", "cols[None, :] <= last[:, None]", "cols[None, :] <= last[:, None] + steps", CACHE),
    Mutant("merged splits not rescaled", DECODE, "_merge_kernel", "acc = acc * rescale + tl.sum(weights[:, None] * o, axis=0)", "acc = acc + tl.sum(weights[:, None] * o, axis=0)", "test_decode.py::test_more_splits_than_are_merged_at_once"),
    Mutant("splits by the batch", DECODE, "_tiles", "max(128, next_power_of_2(cdiv(slots, 64)))", "max(128, next_power_of_2(cdiv(slots, rows)))", "test_decode.py::test_the_split_depends_on_the_cache_alone", False),
    Mutant("a single split read as one of many", DECODE, "_decode_kernel", "slot = (batch.to(tl.int64) * steps + step) * key_heads * group + head", "slot = (batch.to(tl.int64) * key_heads * group + head) * steps + step", "test_decode.py::test_one_split_gives_its_result_itself"),
    Mutant("new keys one slot too late", DECODE, "_append_kernel", "tl.load(lengths_ptr + batch) - steps + step).to", "tl.load(lengths_ptr + batch) - steps + step + 1).to", FEW + "test_new_keys_and_values_go_to_their_slots_and_nowhere_else"),
    Mutant("keys written past the cache", DECODE, "_append_kernel", "(place >= 0) & (place < slots)", "(place >= 0)", FEW + "test_new_keys_and_values_go_to_their_slots_and_nowhere_else"),
    Mutant("few rows: branch_bias dropped", "kernels/few_rows.py", "_linear_kernel", "_row(branch_ptr + m * K, cols, there, ACC) + _row(branch_bias_ptr, cols, there, ACC)", "_row(branch_ptr + m * K, cols, there, ACC)", FEW + "test_a_norm_before_and_a_gelu_after"),
    Mutant("few rows: the first block of channels alone", "kernels/few_rows.py", "_linear_kernel", "tl.static_range(0, K, BLOCK_K)", "tl.static_range(0, BLOCK_K, BLOCK_K)", FEW + "test_a_linear_layer"),
    Mutant("few rows: the stream not rounded before its norm", "kernels/few_rows.py", "_linear_kernel", "x = rounded.to(ACC)", "x = x + 0.0", FEW + "test_the_norm_sees_the_stream_as_it_is_written"),
    Mutant("greedy: the last of equal logits", "kernels/greedy.py", "_greedy_kernel", "better = z > best", "better = z >= best", FEW + "test_the_likeliest_token_is_written_down"),
    Mutant("greedy: infinities go unseen", "kernels/greedy.py", "_greedy_kernel", "spoiled += tl.where(cols < V, z * 0.0, 0.0)", "spoiled += tl.where(z != z, z, 0.0)", FEW + "test_the_likeliest_token_is_written_down"),
    # cross entropy
    Mutant("one-hot missing", LOSS, "_gradient", "dz - (1 - smoothing) * grad, dz", "dz, dz", ENTROPY),
    Mutant("no maximum taken off", LOSS, "_add_up", "new_tops = tl.maximum(tops, tl.max(eights, axis=1))", "new_tops = tl.zeros_like(tops)", "test_cross_entropy.py::test_a_common_offset_and_large_logits"),
    Mutant("tail counted as zeros", LOSS, "_cross_entropy_kernel", 'tl.where(last < V, z, float("-inf"))', "tl.where(last < V, z, 0.0)", ENTROPY),
    Mutant("the padding keeps its logits", LOSS, "_cross_entropy_kernel", "dz = tl.where(last < V, dz, 0.0)", "dz = tl.where(last < V, dz, z)", "test_cross_entropy.py::test_the_padding_of_a_row_is_not_read_and_gets_zeros"),
    Mutant("eights summed over their own maxima", LOSS, "_cross_entropy_kernel", "tl.sum(totals * tl.exp(tops - top), axis=0)", "tl.sum(totals, axis=0)", ENTROPY),
    Mutant("ignored rows have gradients", LOSS, "_cross_entropy_kernel", "grad = tl.where(target == ignore_index, 0.0, grad)", "grad = tl.where(target == ignore_index, 1.0, grad)", ENTROPY),
    Mutant("upstream gradient ignored", LOSS, "_cross_entropy_kernel", "tl.load(row_grads_ptr + row * stride_gn).to(ACC)", "1.0 + 0 * tl.load(row_grads_ptr + row * stride_gn).to(ACC)", ENTROPY),
    Mutant("z-loss halved in the gradient", LOSS, "_cross_entropy_kernel", "(1 + 2 * z_loss * lse)", "(1 + z_loss * lse)", "test_cross_entropy.py::test_smoothing_and_z_loss"),
    Mutant("smoothing over the block", LOSS, "_gradient", "grad * smoothing / V", "grad * smoothing / (V + 1)", "test_cross_entropy.py::test_smoothing_and_z_loss"),
    Mutant("target read out of range", LOSS, "_cross_entropy_kernel", "tl.load(logits_ptr + target, valid, 0.0)", "tl.load(logits_ptr + target)", "test_cross_entropy.py::test_ignored_rows_and_targets_out_of_range"),
    Mutant("dweight of the last chunk alone", "fastgpt/ops/loss.py", "add_product", "total.addmm_(", "total.zero_().addmm_(", "test_cross_entropy.py::test_several_blocks_and_chunks"),
    Mutant("mean over ignored rows too", "fastgpt/ops/loss.py", "_divisor", 'return counted if reduction == "mean"', 'return counted * 0 + len(targets) if reduction == "mean"', ENTROPY),
    Mutant("the kernel's loss from a rounded log-sum-exp", LOSS, "_cross_entropy_kernel", "loss = log_total + (top - z_target)", "loss = lse - z_target", "test_cross_entropy.py::test_a_loss_near_zero_keeps_its_digits"),
    Mutant("each of several gradients is the first", "fastgpt/ops/loss.py", "one_by_one", "arg.select(dim, i)", "arg.select(dim, 0)", "test_several_gradients.py::test_several_gradients_at_once"),
    Mutant("a launcher's sums of the default dtype", MLP, "_gelu_backward", "dtype=statistics_dtype(pre), ", "", "test_other_defaults.py::test_a_kernel"),
    # the fallback's head
    Mutant("the loss from a rounded log-sum-exp", "fastgpt/ops/cpu/logits.py", "_Rows.finish", "log_total + (1 - smoothing) * (self.top - self.z_target)", "lse - smoothing * self.top - (1 - smoothing) * self.z_target", "test_loss.py::test_a_loss_near_zero_keeps_its_digits", False),
    Mutant("smoothing's sum keeps an old top", "fastgpt/ops/cpu/logits.py", "_Rows.read", "self.below += start * (self.top - top)", "pass", FALLBACK_LOSS, False),
    Mutant("a GELU's scale of the default dtype", "fastgpt/ops/cpu/mlp.py", "_scale", "_SCALE, dtype=x.dtype, device=x.device)", "_SCALE, device=x.device)", "test_defaults.py::test_a_function", False),
    Mutant("log-probabilities of the default dtype", "fastgpt/generation/batch.py", "Batch.__init__", "torch.zeros(self.rows, dtype=statistics, ", "torch.zeros(self.rows, ", "test_defaults.py::test_what_is_generated", False),
    Mutant("a run's model of the default dtype", "fastgpt/training/fitting.py", "_made", "torch.set_default_dtype(torch.float32)", "pass", "test_defaults.py::test_a_short_fit_and_its_files", False),
    Mutant("a mapped target out of range passes", "fastgpt/ops/checks.py", "in_range", "    values = unwrapped(values)\n", "    if unwrapped(values) is not values:\n        return\n", "test_transforms.py::test_what_is_mapped", False),
    Mutant("smoothing left out under torch.func", "fastgpt/ops/loss.py", "of_all_logits", "losses = losses - settings.label_smoothing * logprobs.mean(-1)", "pass", "test_transforms.py::test_torch_funcs_gradients", False),
    Mutant("a trace takes the fallback", "fastgpt/ops/transforms.py", "watcher", 'return "torch.jit.trace records the call"', "return None", "test_transforms.py::test_explain_says_so", False),
    Mutant("halves' norms stay halves under CUDA's autocast", "fastgpt/swap/layers.py", "_dtype_of_its_class", 'device != "cpu" and torch', "False and torch", "test_swap_dtypes.py::test_any_layer_norm_of_halves_under_autocast", False),
    Mutant("the book's norm in its input's dtype", "fastgpt/swap/layers.py", "_dtype_of_its_class", 'if swap.names[0] == "scale":', "if False:", "test_swap_dtypes.py::test_every_part_gives_what_it_gave", False),
    Mutant("a stranger's MLP is given halves", "fastgpt/swap/layers.py", "add_then_norm", "alike = branch.dtype == x.dtype or swap_of(then) is not None", "alike = True", "test_swap_dtypes.py::test_what_an_mlp_is_given_under_autocast", False),
    Mutant("a second backward reads what the first wrote over", "fastgpt/ops/cpu/mlp.py", "GeluMlp.backward", "ctx.overwritten = True", "pass", FALLBACK_MLP + "test_a_second_backward_and_a_second_derivative_of_gelu_mlp", False),
    Mutant("the cube's factor without the other", "fastgpt/ops/cpu/mlp.py", "gelu_leaving_slope_", "value=0.044715 * _SCALE, out=z)", "value=0.044715, out=z)", FALLBACK_MLP + "test_gelu_mlp_of_many_rows", False),
    Mutant("a slope of three times too little", "fastgpt/ops/cpu/mlp.py", "gelu_leaving_slope_", "torch.add(s, z, alpha=3, out=part)", "torch.add(s, z, out=part)", FALLBACK_MLP + "test_gelu_mlp_of_many_rows", False),
    Mutant("sums of a slice not rescaled", "fastgpt/ops/cpu/logits.py", "_Rows.read", "self.total *= (self.top - top).exp_()", "pass", FALLBACK_LOSS, False),
    Mutant("targets of every slice", "fastgpt/ops/cpu/logits.py", "_Rows.gradient", "torch.where(inside, (1 - smoothing) * self.grads, 0)", "((1 - smoothing) * self.grads)", FALLBACK_LOSS, False),
    Mutant("dweight of the last rows alone", "fastgpt/ops/cpu/logits.py", "_by_vocabulary", "factor, first)", "factor, True)", FALLBACK_LOSS, False),
    Mutant("a slice of half the vocabulary", "fastgpt/ops/cpu/logits.py", "_by_vocabulary", "24 if dtype == wide else 96", "2 if dtype == wide else 96", "test_loss.py::test_beside_the_gradients_it_holds_a_tenth_of_the_logits", False),
    # MLP
    Mutant("the other GELU", "fastgpt/ops/autograd.py", "gelu_mlp", 'approximate == "tanh"', 'approximate == "none"', MLP_WIDTHS),
    Mutant("0.044751", GELU, "_exp_minus_2u", "(z + 0.044715 * z", "(z + 0.044751 * z", POINTS),
    Mutant("no factor 3 in the derivative", GELU, "gelu_derivative", "0.134145", "0.044715", MLP_WIDTHS),
    Mutant("b_in dropped", MLP, "linear_gelu", "torch.addmm(b_in, x, w_in.t(), out=pre)", "torch.mm(x, w_in.t(), out=pre)", MLP_WIDTHS),
    Mutant("db_in zero", MLP, "gelu_mlp_bwd", "partials.sum(0)", "partials.sum(0) * 0", MLP_WIDTHS),
    Mutant("derivative overflows", GELU, "gelu_derivative", "z = tl.where(z > 10.0, 10.0, tl.where(z < -10.0, -10.0, z))", "z = z", POINTS),
    Mutant("some rows left out of the backward", MLP, "_gelu_bwd_kernel", "tl.num_programs(0) * BLOCK_M)", "2 * tl.num_programs(0) * BLOCK_M)", "test_mlp.py::test_row_counts"),
    Mutant("activation not made again", MLP, "_gelu_backward", "RECOMPUTE=recompute", "RECOMPUTE=False", "test_mlp.py::test_both_gelus_recomputed_or_not"),
    # Embedding
    Mutant("positions not added", EMBEDDING, "_embedding_fwd_kernel", "x += tl.load(position_ptr", "x += 0 * tl.load(position_ptr", "test_embedding.py::test_widths"),
    Mutant("positions taken from the row", EMBEDDING, "_embedding_fwd_kernel", "places = time\n", "places = rows.to(tl.int64)\n", "test_embedding.py::test_widths"),
    Mutant("an id out of range read as 0", EMBEDDING, "_embedding_fwd_kernel", 'x = tl.where(known[:, None], x, float("nan"))', "x = x", "test_embedding.py::test_an_id_out_of_range_is_nan_and_reads_nothing"),
    Mutant("an id past the vocabulary", EMBEDDING, "_embedding_fwd_kernel", "(ids < vocab)", "(ids <= vocab)", "test_embedding.py::test_an_id_out_of_range_is_nan_and_reads_nothing"),
    Mutant("runs not joined", EMBEDDING, "_join_runs_kernel", "for part in range(chunk + 1, last + 1):", "for part in range(chunk + 1, last):", RUNS),
    Mutant("a run counted twice", EMBEDDING, "_run_sums_kernel", "            total = tl.zeros([BLOCK_C], ACC)\n            begins_here", "            begins_here", RUNS),
    Mutant("a head taken for a whole run", EMBEDDING, "_run_sums_kernel", "begins_here = (start == 0) | (tl.load(keys_ptr + start - 1, start > 0, 0).to(tl.int64) != key)\n    total", "begins_here = start >= 0\n    total", RUNS),
    Mutant("dropout of another row", EMBEDDING, "_run_sums_kernel", "rows = tl.zeros([1], tl.int32) + row.to(tl.int32)", "rows = tl.zeros([1], tl.int32) + i", "test_embedding.py::test_dropout_drops_what_the_reference_drops"),
    Mutant("dropout's columns counted anew in each block", EMBEDDING, "_embedding_fwd_kernel", "tl.load(seed_ptr), rows, tl.program_id(1) * BLOCK_C, 0", "tl.load(seed_ptr), rows, 0, 0", "test_embedding.py::test_dropout_beyond_the_first_block_of_columns"),
    Mutant("gradient rows assumed in one piece", EMBEDDING, "_run_sums_kernel", "batch * stride_gb + time * stride_gt + cols64 * stride_gc, in_cols", "row * C + cols64, in_cols", "test_embedding.py::test_strides_change_no_bit"),
    # the swap
    Mutant("hooks not looked for", "fastgpt/private.py", "has_hooks", 'state["_forward_hooks"] or state', "state", PART, False),
    Mutant("hooks before not looked for", "fastgpt/private.py", "has_hooks", 'or state["_forward_pre_hooks"] or', "or", CHILD, False),
    Mutant("parametrizations bypassed", "fastgpt/modules.py", "occupied", 'if "parametrizations" in', 'if "nothing" in', "test_swap_parts.py::test_what_must_be_called", False),
    Mutant("a stranger's subclass bypassed", "fastgpt/modules.py", "is_linear", "type(module).forward is nn.Linear.forward or", "isinstance(module, nn.Linear) or", CHILD, False),
    Mutant("a forward of its own bypassed", "fastgpt/modules.py", "occupied", 'if "forward" in state and not is_ours(module, state["forward"]):', "if False:", CHILD, False),
    Mutant("a replaced activation bypassed", "fastgpt/swap/layers.py", "mlp", "if act is not swap.act or occupied", "if occupied", "test_swap_parts.py::test_a_replaced_activation_is_called", False),
    Mutant("the dropout module's own mode", "fastgpt/modules.py", "dropout_p", "float(module.p) if module.training else 0.0", "float(module.p)", "test_swap.py::test_nanogpts_dropout_stays_where_it_is", False),
    Mutant("no trial", "fastgpt/swap/trial.py", "why_not", "if swap.width == 0:", "if True:", "test_swap_forms.py::test_a_part_of_another_form_is_left", False),
    Mutant("no trial in training mode", "fastgpt/swap/trial.py", "_tried", "for training in (False, True):", "for training in (False,):", "test_swap_forms.py::test_a_part_of_another_form_is_left", False),
    Mutant("a lenient trial", "fastgpt/swap/trial.py", "_agree", "<= 1e-6 * expected.norm()", "<= expected.norm()", "test_swap_forms.py::test_a_part_of_another_form_is_left", False),
    Mutant("restore leaves the swap", SWAP, "_put_back", 'module.__dict__.pop("fastgpt_swap", None)', "pass", "test_swap.py::test_restore_undoes_all_of_it", False),
    Mutant("scale not read", "fastgpt/swap/gpt2.py", "_heads", 'scale=getattr(attn, "scaling", None)', "scale=None", "test_families_gpt2.py::test_scale_flags", False),
    Mutant("padding not handed on", GPT2, "key_mask", "return padding is not None and padding.shape == (mask.shape[0], keys), padding", "return padding is not None, None", "test_families_gpt2.py::test_padding", False),
    Mutant("any mask taken for padding", GPT2, "key_mask", "if queries == 1:", "if queries >= 1:", "test_families_gpt2.py::test_packed_documents_and_masks_of_four_axes", False),
    Mutant("checkpointing lost", "fastgpt/swap/gpt2.py", "block", "is not None or checkpointed:", "is not None:", "test_swap_composes.py::test_checkpointing_happens", False),
    Mutant("a cache that is never filled", "fastgpt/swap/book.py", "_heads", "if use_cache and cache is not None:", "if False:", "test_families_book.py::test_the_cache_of_the_packages_variant_works", False),
    Mutant("loss ignores -100", "fastgpt/swap/nanogpt.py", "model", "ignore_index=-1,", "ignore_index=-100,", "test_families_nanogpt.py::test_the_loss_ignores_minus_one", False),
    Mutant("no mask function", "fastgpt/families/huggingface.py", "", "AttentionMaskInterface.register(IMPLEMENTATION, mask_function)", "", "test_families_huggingface.py::test_the_door_gives_sdpas_numbers", False),
    # generation
    Mutant("positions one too early", ATTENDED, "Step.__init__", "self.positions = lengths[:, None] + offsets", "self.positions = (lengths[:, None] - 1 + offsets).clamp(min=0)", CACHED, False),
    Mutant("a stale cache row", "fastgpt/ops/decoding.py", "OnPyTorch.append", "values[rows, :, places] = v", "pass", CACHED, False),
    Mutant("a position of a filled cache one too late", ATTENDED, "Step.__init__", "None, longest + offsets", "None, longest + 1 + offsets", ALONE, False),
    Mutant("keys of a filled cache a slot early", ATTENDED, "Step.__init__", "longest - new :, :]", "longest - new - 1 : -1, :]", ALONE, False),
    Mutant("a token that does not see itself", STEPS, "OnPyTorch.attend", "return F.scaled_dot_product_attention(q, keys, values, scale", "return F.scaled_dot_product_attention(q, keys[:, :, :-1], values[:, :, :-1], scale", ALONE, False),
    Mutant("the fused step skips a residual add", "fastgpt/ops/decoding.py", "_sum", "total = x if branch is None else x + branch", "total = x if branch is None else branch", ALONE, False),
    Mutant("the fused step without its GELU", "fastgpt/ops/decoding.py", "OnPyTorch.norm_linear", "(_gelu(y, gelu) if gelu else y), x", "y, x", ALONE, False),
    Mutant("a bag without its bias", LINEARS, "BagLinear.__init__", "if bias is not None:", "if False:", "test_linears.py::test_bags_are_a_linear_layer", False),
    Mutant("threads share what x is written to", LINEARS, "_Scratch", "class _Scratch(threading.local):", "class _Scratch:", "test_linears.py::test_layers_of_one_shape_keep_out_of_each_others_way", False),
    Mutant("streams that x does not follow", LINEARS, "BagLinear.__init__", ".view(streams, -1).t().flatten()", ".view(-1, streams).t().flatten()", "test_linears.py::test_bags_are_a_linear_layer", False),
    Mutant("tensors that overlap", "fastgpt/memory.py", "LargePages.empty", "* _CACHE_LINE :]", "* _CACHE_LINE // 2 :]", "test_linears.py::test_tensors_on_large_pages", False),
    Mutant("a sum that need not be finite", BATCH, "Batch._finite_at_a_glance", "math.isfinite(logits.sum().item())", "True", BATCHED + "test_finite_logits_whose_sum_is_not", False),
    Mutant("logits after the padding", DECODER, "Decoder.prefill", "x.gather(1, (lengths - 1)", "x.gather(1, (lengths.new_full(lengths.shape, ids.shape[1]) - 1)", CACHED, False),
    Mutant("the family's scale not read", READ, "View._block", "scale=layer.scale", "scale=None", CACHED, False),
    Mutant("no trial of a stranger's model", DECODER, "Decoder.__init__", "            self._try(model)", "            pass", "test_decoder.py::test_a_model_of_another_form_is_refused", False),
    Mutant("modes not restored", DECODER, "Decoder._evaluating", "module.training = training", "pass", "test_decoder.py::test_the_model_is_left_as_it_was", False),
    Mutant("top_p one token short", SAMPLING, "Sampling._candidates", "F.pad(counts.cumsum(-1)[:, :-1], (1, 0))", "counts.cumsum(-1)", SAMPLED + "test_top_p_ends_with_the_token_that_reaches_it", False),
    Mutant("top_p's boundary", SAMPLING, "Sampling._candidates", "before >= max(1, int(self.top_p * _ONE))", "before > max(1, int(self.top_p * _ONE))", SAMPLED + "test_top_p_ends_with_the_token_that_reaches_it", False),
    Mutant("min_p of all, not of the likeliest", SAMPLING, "Sampling._candidates", "self.min_p * weights.amax(-1, keepdim=True)", "self.min_p", DRAWN, False),
    Mutant("temperature after the filters", SAMPLING, "Sampling._candidates", "keepdim=True)) / self.temperature", "keepdim=True))", DRAWN, False),
    Mutant("a penalty that rewards", SAMPLING, "Sampling._penalised", "torch.where(logits > 0, logits / penalty, logits * penalty)", "logits / penalty", SAMPLED + "test_the_penalty_shuns_what_was_seen_whatever_its_sign", False),
    Mutant("new tokens not seen", BATCH, "Batch._take", "self.seen.scatter_(1, ids, True)", "pass", SAMPLED + "test_repetition_penalty_sees_each_row_and_each_new_token", False),
    Mutant("samples of another prompt", BATCH, "Batch.first_logits", "return self.decoder.prefill(prompts, lengths, self.cache).repeat_interleave(self.samples, 0)", "return self.decoder.prefill(prompts, lengths, self.cache).repeat(self.samples, 1)", SAMPLED + "test_samples_of_a_prompt_share_its_row", False),
    Mutant("a window of one token less", BATCH, "Batch._window", "starts = (self.lengths - context)", "starts = (self.lengths - context + 1)", GENERATION + "test_slide_forgets_the_oldest", False),
    Mutant("a stop id ends all rows", "fastgpt/generation/__init__.py", "_told", "if all(row.reason is not None for row in rows):", "if any(row.reason is not None for row in rows):", STOPS, False),
    Mutant("a stop id ignored in one row", "fastgpt/generation/__init__.py", "_Row.take", "if token in self.stops.ids:", "if token in self.stops.ids and self.prompt[0] != 7:", STOPS, False),
    Mutant("a stop string shown in part", "fastgpt/generation/__init__.py", "_Row._read", "held = 0 if final else", "held = 0 if True else", SAMPLED + "test_stop_strings", False),
    Mutant("half a character shown", "fastgpt/generation/__init__.py", "_Row._read", "self._decoder.decode(data, final)", "data.decode(errors='replace')", SAMPLED + "test_characters_are_streamed_whole", False),
    Mutant("every proposal taken", SPECULATIVE, "Speculation._taken", "(chance * q < p)", "(chance * q < p + 9)", SAMPLED + "test_a_draft_gives_the_models_distribution", False),
    Mutant("a rejected proposal drawn anew from p", SPECULATIVE, "Speculation.round", "left = (rest - guess).clamp(min=0)", "left = rest", SAMPLED + "test_a_draft_gives_the_models_distribution", False),
    Mutant("tokens after a rejection kept", SPECULATIVE, "Speculation._taken", ".cumprod(dim=1)", "", SAMPLED + "test_a_draft_changes_no_greedy_token", False),
    Mutant("tokens counted twice in eval", "fastgpt/generation/evaluation.py", "_loss", "begin + i + 1 >= counted", "begin + i + 1 >= 0", "test_cli_text.py::test_eval_is_the_plain_sum_over_tokens", False),
    Mutant("an eval window that forgets a token", "fastgpt/generation/evaluation.py", "_batches", "begin = max(0, end - window - 1)", "begin = max(0, end - window)", "test_cli_text.py::test_eval_is_the_plain_sum_over_tokens", False),
    # the choice
    Mutant("explain forgets that a backward writes over the hidden units", "fastgpt/ops/pytorch.py", "mlp_form", 'return "differentiated in place" if eager_cpu else "plain"', 'return "plain"', "test_explain.py::test_explain_tells_the_form_of_the_mlp", False),
    Mutant("a GELU's passes from one unit on", "fastgpt/ops/cpu/mlp.py", "by_passes", "units >= _AT_ONCE // 4", "units >= 1", "test_explain.py::test_explain_tells_the_form_of_the_mlp", False),
    Mutant("logits by rows however few they are", "fastgpt/ops/cpu/logits.py", "way", "chunk >= _FEWEST_ROWS and", "chunk >= 1 and", "test_explain.py::test_explain_tells_the_way_over_the_logits", False),
    # weights
    Mutant("the square c_proj not transposed", GPT2, "", '"attn.c_attn.weight", "attn.c_proj.weight",', '"attn.c_attn.weight",', "test_convert.py::test_square_weights_are_transposed_by_value", False),
    Mutant("queries and keys swapped", RASCHKA, "", 'SPLIT = ("W_query", "W_key", "W_value")', 'SPLIT = ("W_key", "W_query", "W_value")', "test_convert.py::test_the_books_model_gives_its_own_logits", False),
    Mutant("an untied head lost", "fastgpt/weights/pretrained.py", "_infer", 'fields["tie"] = head is None or torch.equal', 'fields["tie"] = head is None or True or torch.equal', "test_convert.py::test_the_books_model_gives_its_own_logits", False),
    Mutant("nanoGPT's GELU taken for GPT-2's", "fastgpt/families/nanogpt.py", "read_weights", '{"gelu": "none", **fields}', '{"gelu": "tanh", **fields}', "test_convert.py::test_nanogpts_model_gives_its_own_logits", False),
    Mutant("sizes of storages unchecked", FILES, "read_weights_of", "if tensor.numel() * tensor.element_size() >", "if 0 >", "test_convert_files.py::test_a_claim_of_more_than_is_stored", False),
    Mutant("names that leave the folder", FILES, "_read_parts", 'if Path(part).name != part or', 'if', "test_convert_files.py::test_an_index_never_leaves_its_folder", False),
    Mutant("old mask buffers kept", FILES, "read_weights_of", "if _MASK.search(plain):", "if False:", "test_convert.py::test_mask_buffers_say_nothing", False),
    Mutant("files of weights that may run code", "fastgpt/weights/files.py", "_load", "weights_only=True", "weights_only=False", "test_convert_files.py::test_nothing_is_unpickled_or_unpacked", False),
    Mutant("padding with copies", "fastgpt/weights/pretrained.py", "_with_vocabulary", "rows.new_zeros(vocab_size - len(rows), rows.shape[1])", "rows[: vocab_size - len(rows)]", "test_convert.py::test_the_vocabulary_is_padded_and_cropped", False),
    # training
    Mutant("resume without RNG", "fastgpt/training/run.py", "Run.restore", "if not state.restore_generators(saved, self.world):", "if False:", RESUMED, False),
    Mutant("resume without data position", "fastgpt/training/run.py", "Run.restore", 'facts["step"], facts["windows"], list', 'facts["step"], 0, list', RESUMED, False),
    Mutant("resume without optimizer", "fastgpt/training/state.py", "restore", 'optimizer.state[parameter] = {"step": step, **state}', "pass", RESUMED, False),
    Mutant("resume without the scale of float16", "fastgpt/training/run.py", "Run.restore", 'if facts.get("scaler"):', "if False:", "test_state.py::test_the_scale_of_float16_goes_on", False),
    Mutant("starting anew where checkpoints are broken", "fastgpt/training/fitting.py", "_starting_point", "if newest is None and passed:", "if False:", "test_resume.py::test_it_never_starts_anew_where_checkpoints_are_broken", False),
    Mutant("checksum not verified", CHECKPOINT, "Checkpoint.verify", 'if contents and digest(file) != said["sha256"]:', "if False:", "test_checkpoints.py::test_a_broken_file_is_found_and_the_one_before_taken", False),
    Mutant("rename before fsync", CHECKPOINT, "Checkpoints.save", """            self._seal(new, {"step": step, **facts})
            os.rename(new, checkpoint.path)
""", """            os.rename(new, checkpoint.path)
            self._seal(checkpoint.path, {"step": step, **facts})
""", "test_checkpoints.py::test_all_is_on_the_disk_before_the_rename_and_the_rename_after", False),
    Mutant("rename before the manifest", CHECKPOINT, "Checkpoints.save", """            self._seal(new, {"step": step, **facts})
            os.rename(new, checkpoint.path)
""", """            os.rename(new, checkpoint.path)
            self._seal(checkpoint.path, {"step": step, **facts})
""", "test_checkpoints.py::test_a_death_between_any_two_calls_to_the_system_leaves_a_valid_checkpoint", False),
    Mutant("parent not flushed", CHECKPOINT, "Checkpoints.save", "            sync(self.folder)\n", "", "test_checkpoints.py::test_all_is_on_the_disk_before_the_rename_and_the_rename_after", False),
    Mutant("broken checkpoints counted as kept", CHECKPOINT, "Checkpoints.purge", "whole[-KEPT:]", "self.all()[-KEPT:]", "test_checkpoints.py::test_broken_ones_do_not_count_as_kept", False),
    Mutant("the best one purged", CHECKPOINT, "Checkpoints.purge", "losses[each])[:1]", "losses[each])[:0]", "test_checkpoints.py::test_the_newest_two_and_the_best_are_kept", False),
    Mutant("a lock for many", CHECKPOINT, "_lock", "fcntl.LOCK_EX", "fcntl.LOCK_SH", "test_checkpoints.py::test_a_folder_has_one_trainer", False),
    Mutant("NaN check after the step", "fastgpt/training/step.py", "Step._guarded_update", "self.max_norm or torch.inf, self.stopped)", "self.max_norm or torch.inf)", "test_train.py::test_a_loss_that_is_not_finite_stops_without_an_update", False),
    Mutant("NaN not looked at", "fastgpt/training/run.py", "Run.read", "if math.isfinite(loss) and (math.isfinite(norm) or overflow) and self", "if self", "test_train.py::test_a_loss_that_is_not_finite_stops_without_an_update", False),
    Mutant("skipped steps are not counted", "fastgpt/training/run.py", "Run.read", "self.skipped += 1", "self.skipped += 0", "test_run.py::test_steps_that_are_not_finite_may_be_skipped", False),
    Mutant("nothing is updated after a skipped step", "fastgpt/training/step.py", "Step._guarded_update", "self.stopped.zero_()", "self.stopped += 0", "test_run.py::test_steps_that_are_not_finite_may_be_skipped", False),
    Mutant("an older checkpoint in spite of strict_resume", "fastgpt/training/fitting.py", "_starting_point", "if passed and strict:", "if False:", "test_resume.py::test_strict_resume_takes_no_older_one", False),
    Mutant("missing all-reduce of gradients", "fastgpt/training/distributed.py", "replicate", "return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)", "return model", WORLD, False),
    Mutant("missing all-reduce of the loss", "fastgpt/training/distributed.py", "World.mean", "            dist.all_reduce(value)\n", "", WORLD, False),
    Mutant("every process sees the same windows", "fastgpt/training/run.py", "Run.batches", "seen + self.world.rank * mine", "seen", WORLD, False),
    Mutant("the same dropout in every process", "fastgpt/training/run.py", "Run.__init__", "_rank_seed(config.seed, world.rank, 0)", "_rank_seed(config.seed, 0, 0)", "test_distributed.py::test_dropout_differs_by_rank", False),
    Mutant("accumulation adds up", "fastgpt/training/optimizer.py", "TrainingStep._step", "targets[number]) / len(idx)", "targets[number])", "test_step.py::test_accumulation_is_the_large_batch", False),
    Mutant("a cut between a space and its word", "fastgpt/data/tokenization.py", "_cut", "            return place\n", "            return place + 1\n", "test_tokens.py::test_pieces_and_threads_change_no_token", False),
    Mutant("a call that looks ahead is not heard", GPT2, "special", 'return asked or call.get("is_causal") is False', "return asked", "test_families_gpt2.py::test_a_call_of_attention_that_asks_for_more_is_left_to_itself", False),
    Mutant("the last steps of a GPU are not read", "fastgpt/generation/__init__.py", "_told", "while len(readback) and any(row.reason is None for row in rows)", "while False", BATCHED + "test_what_a_gpu_tells_is_waited_for_some_steps_later", False),
    Mutant("a GPU's generator is not put back", "fastgpt/training/state.py", "restore_generators", 'torch.cuda.set_rng_state(saved.random[f"cuda.{world.rank}"], world.device)', "pass", "test_state.py::test_the_generators_of_a_gpu_are_kept_and_put_back", False),
    Mutant("every process takes the GPU of its rank", "fastgpt/training/distributed.py", "join", "f\"cuda:{os.environ['LOCAL_RANK']}\"", "f\"cuda:{os.environ['RANK']}\"", "test_distributed.py::test_each_process_of_a_machine_has_its_own_gpu", False),
    Mutant("compiled before it is sharded", "fastgpt/training/run.py", "_distributed", "        shard(model, world)\n        if config.compile:\n            model.compile()\n", "        if config.compile:\n            model.compile()\n        shard(model, world)\n", "test_distributed.py::test_a_sharded_model_is_compiled_after_it_is_sharded", False),
    # what does more than its class, and what only looks like it
    Mutant("a Decoder trusts the count of writes", READ, "Sources.changed", "not torch.equal(now, self._sample)", "False", KEPT + "test_a_decoder_is_no_longer_that_of_a_model_that_was_trained", False),
    Mutant("a Decoder keeps tensors that were replaced", READ, "Sources.changed", "if any(_address(getattr(module, name, None)) != address", "if any(False and address", KEPT + "test_a_decoder_of_weights_that_were_replaced", False),
    Mutant("evaluation of what was before", "fastgpt/generation/evaluation.py", "evaluate", "    decoder.check_unchanged()\n", "", KEPT + "test_a_decoder_is_no_longer_that_of_a_model_that_was_trained", False),
    Mutant("a capture on PyTorch's own stream", "fastgpt/cuda_graph.py", "captured", "stream=_stream(device)", "stream=None", BATCHED + "test_a_step_is_captured_once_and_replayed", False),
    Mutant("no dropout in a trial", "fastgpt/swap/trial.py", "", "_DROPOUT = 0.25", "_DROPOUT = 0.0", FORMS + "test_dropout_in_another_place", False),
    Mutant("no large numbers in a trial", "fastgpt/swap/trial.py", "_inputs", "x[1, 4] *= 30", "x[1, 4] *= 1", FORMS + "test_attention_with_bounds", False),
    Mutant("one trial for layers with other buffers", "fastgpt/swap/trial.py", "key", "return (shapes, buffers, parts,", "return (shapes, parts,", FORMS + "test_layers_that_differ_are_each_tried", False),
    Mutant("one trial for layers in other places", "fastgpt/swap/trial.py", "_settings", '"layer_idx" if own_type(module).forward.__module__.startswith("transformers.") else None', '"layer_idx"', FORMS + "test_layers_that_differ_are_each_tried", False),
    Mutant("a mask for strangers", "fastgpt/swap/gpt2.py", "_takes_ours", "return module is not None and _takes_any(own_type(module))", "return True", "test_families_gpt2_subclasses.py::test_a_subclass_without_room_for_our_mask", False),
    Mutant("a block's word is not heard", "fastgpt/swap/gpt2.py", "block", "understood = x is not None and (_is_theirs(block) or call.keys() <= _KNOWN)", "understood = True", "test_families_gpt2_subclasses.py::test_what_a_subclass_is_told_beside_the_known_arguments", False),
    Mutant("attention sinks are passed by", "fastgpt/families/huggingface.py", "attention_function", 'if kwargs.get("s_aux") is not None:', "if False:", "test_families_huggingface.py::test_attention_sinks_are_refused", False),
    Mutant("GPT passes by a hooked norm", MODEL, "LayerNorm.add", "if branch is not None and not occupied(self) and", "if branch is not None and", HOOKED, False),
    Mutant("GPT passes by a hooked projection", MODEL, "Block.forward", "leaves_bias = only_multiplies(self.attn.c_proj)", "leaves_bias = True", HOOKED, False),
    Mutant("GPT passes by a hooked MLP", MODEL, "MLP.forward", "if not (free_linear(self.c_fc) and free_linear(self.c_proj)):", "if False:", HOOKED, False),
    Mutant("GPT passes by a hooked embedding", MODEL, "GPT.embed", "if free_embedding(self.wte) and free_embedding(self.wpe):", "if True:", HOOKED, False),
    Mutant("GPT adds a bias twice", MODEL, "GPT.features", "branch_bias = block.mlp.c_proj.bias if leaves_bias else None", "branch_bias = block.mlp.c_proj.bias", HOOKED + "[h.1.mlp.c_proj-off]", False),
    Mutant("GPT does not hear positions", MODEL, "GPT.features", "x = self.embed(idx, positions)", "x = self.embed(idx)", HOOKED, False),
    Mutant("GPT does not hear the scale of the scores", MODEL, "CausalSelfAttention.forward", "cache.attend(self.layer, qkv, self.scale)", "cache.attend(self.layer, qkv, None)", "test_decoder.py::test_a_gpts_own_features_with_a_cache", False),
    Mutant("all layers in one layer's cache", MODEL, "GPT.__init__", "Block(config, layer) for layer", "Block(config) for layer", "test_decoder.py::test_a_gpts_own_features_with_a_cache", False),
    Mutant("a subclass is walked through as ours", READ, "is_plain_gpt", "    if own_type(model) is not GPT:\n        return False\n", "    if not isinstance(model, GPT):\n        return False\n", "test_model_parts.py::test_a_model_of_ones_own_is_not_walked_through_as_ours", False),
    # runs and data
    Mutant("overwritten before it can begin", "fastgpt/training/fitting.py", "_starting_point", "        elif checkpoints.all() and not overwrite:\n", "        elif overwrite:\n            _clear(folder)\n        elif checkpoints.all():\n", "test_run.py::test_what_fails_before_the_first_step_overwrites_nothing", False),
    Mutant("a finished run leaves no model", "fastgpt/training/run.py", "Run.loop", "if first >= config.max_iters:", "if False:", "test_run.py::test_a_kill_between_the_last_checkpoint_and_the_model", False),
    Mutant("every file of tokens has two bytes an id", "fastgpt/data/corpora.py", "_mapped", 'map_tokens(path, meta.get("dtype", dtype_of(encoding).name))', "map_tokens(path)", "test_data.py::test_one_file_of_a_large_encoding", False),
    Mutant("a text of a folder is dropped", "fastgpt/data/corpora.py", "_utf8", "if path.suffix in TEXT:", "if False:", "test_data.py::test_a_text_of_a_folder_with_a_bad_byte", False),
    # accelerate leaves the world as it was
    Mutant("a trial reseeds every device", "fastgpt/swap/trial.py", "_tried", "            torch.default_generator.manual_seed(0)\n", "            torch.manual_seed(0)\n", WORLDLY + "test_no_generator_moves", False),
    Mutant("the CPU's generator is not put back", "fastgpt/swap/layers.py", "aside", "        generator.set_state(drawn)\n", "        pass\n", WORLDLY + "test_no_generator_moves", False),
    Mutant("a module holds itself", "fastgpt/swap/__init__.py", "_put_in", '    module.__dict__["fastgpt_swap"] = swap\n', '    module.__dict__["fastgpt_swap"] = swap\n    module.__dict__["itself"] = module\n', WORLDLY + "test_a_model_is_freed_with_its_last_name", False),
    Mutant("a trial in the user's default dtype", "fastgpt/swap/layers.py", "aside", "    torch.set_default_dtype(torch.float32)\n", "", WORLDLY + "test_defaults_do_not_change_the_trial", False),
    Mutant("a trial on the user's default device", "fastgpt/swap/layers.py", "aside", 'with torch.no_grad(), torch.device("cpu"), torch.autocast', "with torch.no_grad(), torch.autocast", WORLDLY + "test_defaults_do_not_change_the_trial", False),
    Mutant("a patched forward is not heard", "fastgpt/modules.py", "swapped_class.forward", "if swap is None or plain.forward is not written:", "if swap is None:", CHANGED + "test_a_class_that_changes_later_is_heard", False),
    Mutant("children added later are skipped", "fastgpt/swap/layers.py", "mlp", "if tuple(private.children(module)) != swap.children:", "if False:", CHANGED + "test_children_of_a_sequential_are_those_of_now", False),
    Mutant("the default dtype is not put back", "fastgpt/swap/layers.py", "aside", "        torch.set_default_dtype(dtype)\n", "", WORLDLY + "test_defaults_do_not_change_the_trial", False),
    Mutant("a mask on the meta device of one kind", "fastgpt/swap/trial.py", "why_not", "return lower and _tried(module, swap, lambda ones: ones.triu(1)) and lower", "return lower", WORLDLY + "test_a_model_on_the_meta_device_is_served_as_the_real_one", False),
    Mutant("a patched class is bypassed", "fastgpt/modules.py", "runs", "return made is not None and made.plain.forward is made.written", "return made is not None", CHANGED + "test_a_class_that_changes_later_is_heard", False),
    Mutant("a class set later is bypassed", "fastgpt/modules.py", "swap_of", "return swap if swap is not None and runs(module) else None", "return swap", CHANGED + "test_a_class_that_changes_later_is_heard", False),
    Mutant("a stranger's class is told of ours", "fastgpt/modules.py", "_Swapped.__init_subclass__", 'if any(each.__name__ == "GradientCheckpointingLayer"', "if any(True", CHANGED + "test_a_class_that_lists_its_subclasses_lists_none_of_ours", False),
    Mutant("transformers is not told of our class", "fastgpt/modules.py", "_Swapped.__init_subclass__", '== "GradientCheckpointingLayer"', '== "nobody"', "test_swap_composes.py::test_checkpointing_happens", False),
    Mutant("a forward that unwraps to the class's", "fastgpt/modules.py", "swapped_class", 'own.__dict__["__signature__"] = inspect.signature(written)', 'own.__dict__["__wrapped__"] = written', CHANGED + "test_the_accelerate_packages_wrapper_comes_off_again", False),
    # what shows a run, encodings with holes, no network
    Mutant("only a disk's error is told", MONITOR, "Monitor.attempt", "        except Exception as error:  # a disk, a", "        except (OSError, ValueError) as error:  # a disk, a", TOLD, False),
    Mutant("shown before it is saved", "fastgpt/training/run.py", "Run.loop", "            if saves or stop:\n                self.save(needed=last or bool(stop))\n            if evaluates:  # after the save: what only shows the run must not cost it\n                self.report()\n", "            if evaluates:\n                self.report()\n            if saves or stop:\n                self.save(needed=last or bool(stop))\n", SHOWN + "test_all_is_saved_before_anything_is_shown", False),
    Mutant("an evaluation that fails is passed over", "fastgpt/training/run.py", "Run.loop", '"val_loss": self.evaluate(),', '"val_loss": 0.0 if self.monitor and not self.monitor.attempt(0, "it", self.evaluate) else 0.0,', SHOWN + "test_an_error_of_the_training_itself_ends_it", False),
    Mutant("a failure of the plot takes the sample along", MONITOR, "Monitor.evaluated", "self.attempt(step, PLOT, plot_losses, rows, self.folder / PLOT)", "plot_losses(rows, self.folder / PLOT)", TOLD, False),
    Mutant("TensorBoard fails at every look", MONITOR, "Monitor._record", "            self.events = None\n\n", "            pass\n\n", SHOWN + "test_tensorboard_that_fails_is_told_once", False),
    Mutant("the last sample's error is the command's", "fastgpt/cli/train.py", "run", "    except Exception as error:  # the run is done and saved\n", "    except OSError as error:\n", SHOWN + "test_the_last_sample_fails_behind_a_run_that_is_saved", False),
    Mutant("holes are drawn", BATCH, "Batch.allowed", "return logits if self._never is None else logits.masked_fill(self._never, torch.finfo(logits.dtype).min)", "return logits", UNDRAWN, False),
    Mutant("a draft's round draws holes", SPECULATIVE, "Speculation.round", "logits = batch.allowed(logits)  # (B, count + 1, V)", "logits = logits[..., : batch.vocab_size]", UNDRAWN, False),
    Mutant("holes are as unlikely as infinity", BATCH, "Batch.allowed", "torch.finfo(logits.dtype).min)", "-torch.inf)", UNDRAWN, False),
    Mutant("a vocabulary past the encoding", "fastgpt/generation/__init__.py", "_vocabulary", "return min(asked or encoding.n_vocab, encoding.n_vocab)", "return asked or encoding.n_vocab", HOLED + "test_a_vocabulary_asked_for_is_cut_to_the_encoding", False),
    Mutant("holes in a file of tokens", "fastgpt/data/tokens.py", "examine", "if holes and (lost", "if False and (lost", HOLED + "test_tokens_that_hold_one_are_refused_by_number", False),
    Mutant("tokens need an encoding", "fastgpt/training/plan.py", "_encoding", "        if without is None:\n", "        if True:\n", OFFLINE + "test_tokens_are_trained_on", False),
    Mutant("an encoding is asked for that nothing needs", "fastgpt/training/plan.py", "_encoding", "if not wanted and without", "if False and without", OFFLINE + "test_without_samples_nothing_is_asked_for_and_nothing_said", False),
    Mutant("samples are left out without a word", "fastgpt/training/fitting.py", "train", "if isinstance(encoding, Named) and config.sample_tokens:", "if False:", OFFLINE + "test_tokens_are_trained_on", False),
    Mutant("an encoding that was asked for is done without", "fastgpt/training/plan.py", "plan_run", 'for option in ("sample_prompt", "sample_tokens"))', "for option in ())", OFFLINE + "test_what_was_asked_for_and_can_not_be_had_is_an_error_before_anything_is_touched", False),
    Mutant("eval needs an encoding for tokens", "fastgpt/cli/text.py", "_encoding_of", "        if without is None:\n", "        if True:\n", OFFLINE + "test_eval_leaves_out_bits_a_byte", False),
    Mutant("tokens are held to no vocabulary offline", "fastgpt/data/tokens.py", "examine", "outside = part >= encoding.n_vocab", "outside = part >= 2**32", OFFLINE + "test_a_token_past_the_vocabulary_is_still_found", False),
    # who judges
    Mutant("verify takes the fallback for the reference", "fastgpt/verify.py", "", "from fastgpt.ops import reference\n", "from fastgpt.ops import pytorch as reference\n", JUDGED + "test_verify_sees_it", False),
    Mutant("verify looks at no gradient", "fastgpt/verify.py", "_results", "return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]", "return [out.detach() for out in outs]", JUDGED + "test_verify_sees_it", False),
    Mutant("a GPT is verified by the fallback", "fastgpt/testing.py", "on_reference", 'object.__setattr__(module, "backend", reference)', 'object.__setattr__(module, "backend", "torch")', "test_reference.py::test_a_model_on_the_reference", False),
    Mutant("verify ends well whatever it finds", "fastgpt/cli/check.py", "_verify", "return int(not found.passed)", "return 0", JUDGED + "test_verify_sees_it", False),
    Mutant("bench takes the fallback for the reference", "bench/cases.py", "", "from fastgpt.ops import pytorch, reference\n", "from fastgpt.ops import pytorch\nreference = pytorch\n", JUDGED + "test_bench_sees_it", False),
    Mutant("bench judges models by the fallback", "bench/models.py", "train_step.exact", "step(on_reference(with_backend(", "step((with_backend(", JUDGED + "test_bench_sees_it", False),
    Mutant("the reference smooths no label", "fastgpt/ops/reference.py", "linear_cross_entropy", "+ label_smoothing / len(weight)", "", "test_reference.py::test_linear_cross_entropy", False),
    Mutant("the reference's variance is unbiased", "fastgpt/ops/reference.py", "layer_norm", "centred.square().mean(-1, keepdim=True)", "centred.var(-1, keepdim=True)", "test_reference.py::test_layer_norm", False),
    Mutant("the reference's Philox has nine rounds", "fastgpt/ops/reference.py", "philox", "for _ in range(10):", "for _ in range(9):", "test_reference.py::test_philox_gives_the_published_words", False),
    # what README promises, where nothing above breaks it
    Mutant("the fallback does not centre", "fastgpt/ops/pytorch.py", "layer_norm", "x = x - x.detach().mean(-1, keepdim=True)", "pass", FALLBACK + "test_layer_norm_far_from_zero", False),
    Mutant("a run that sets no seed", "fastgpt/training/fitting.py", "train", "torch.manual_seed(config.seed)", "pass", "test_train.py::test_the_same_seed_gives_the_same_bits", False),
    Mutant("the next token is seen", TILES, "sees", "seen = k <= q", "seen = k <= q + 1", "test_attention.py::test_later_tokens_change_no_bit"),
    Mutant("offsets of 32 bits", TILES, "head_of", "pointer + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h", "pointer + batch * stride_b + head * stride_h", "test_large.py::test_attention"),
    Mutant("an index that leaves its folder", "fastgpt/weights/files.py", "_read_parts", "if Path(part).name != part or", "if", "test_convert_files.py::test_an_index_never_leaves_its_folder", False),
    Mutant("an id past the vocabulary passes", "fastgpt/ops/checks.py", "in_range", "outside = (values < 0) | (values >= limit)", "outside = values < 0", "test_ops.py::test_a_bad_argument_is_named", False),
    Mutant("doctor: an old card passes", "fastgpt/doctor.py", "_gpus", "card.major < 8", "card.major < 7", "test_doctor.py::test_an_old_card", False),
    Mutant("doctor: problems without an exit code", "fastgpt/cli/check.py", "_doctor", "return int(not diagnosis.healthy)", "return 0", "test_doctor.py::test_the_command", False),
    Mutant("documents end after their end", "fastgpt/data/windows.py", "documents", "return (idx == end).cumsum(1)", "return (idx == end).cumsum(1) - (idx == end).long()", "test_data.py::test_documents_begin_with_the_end_of_the_one_before", False),
    # small models on a CPU, what callers give, what was made of texts, and what a user is told
    Mutant("a second thread for a small model", "fastgpt/generation/batch.py", "threads_for", "decoder.outputs) > SMALL:", "decoder.outputs) > -1:", BATCHED + "test_a_small_model_takes_one_thread_a_token_and_gives_the_others_back", False),
    Mutant("threads are kept after a failure", "fastgpt/generation/batch.py", "threads_for", "    finally:\n        torch.set_num_threads(threads)\n", "    finally:\n        pass\n    torch.set_num_threads(threads)\n", BATCHED + "test_a_step_that_fails_gives_the_threads_back", False),
    Mutant("a mask that is added to scores", "fastgpt/generation/given.py", "_unpadded", "if each not in (0, 1):", "if False:", GENERATION + "test_bad_argument_is_refused_by_the_call_itself", False),
    Mutant("any pickle of characters is read", "fastgpt/data/characters.py", "name_in", "if opcode.name not in _OPCODES or", "if", "test_characters.py::test_a_file_of_anyones_runs_no_code", False),
    Mutant("characters in another order", "fastgpt/data/characters.py", "name_in", "[names[number] for number in range(len(names))]", "sorted(names.values(), reverse=True)", "test_characters.py::test_its_tokens_are_the_texts_characters", False),
    Mutant("tokens and runs among the texts are read", "fastgpt/data/texts.py", "files_in", "if path.parent != folder and _is_ours(path.parent)]", "if False]", "test_tokens.py::test_the_tokens_never_lie_among_the_texts", False),
    Mutant("changed settings are not told", "fastgpt/training/run.py", "Run.restore", "for name, value in settings.items() if name not in shown}", "for name, value in settings.items() if False}", "test_resume.py::test_settings_that_another_run_would_have_are_told", False),
    Mutant("a refused run leaves its lock", "fastgpt/training/fitting.py", "train", "if held and not was_locked:", "if False:", "test_cli.py::test_a_refused_run_leaves_nothing_in_a_folder_that_was_there", False),
    Mutant("attention with its own cache is said to be served", "fastgpt/swap/book.py", "recognise", 'if "use_cache" in parameters and not caches:', "if False:", "test_families_book.py::test_attention_with_a_cache_of_its_own_is_left_and_the_report_says_so", False),
    Mutant("buffers of zeros are taken to stay", "fastgpt/swap/trial.py", "why_not", "if why is None and any(map(_is_empty, module.buffers())):", "if False:", FORMS + "test_a_buffer_that_is_zero_and_may_be_filled_later", False),
    Mutant("a dropout's hook is passed by", "fastgpt/families/anatomy.py", "hooked", "if isinstance(each, nn.Dropout) and occupied(each))", "if False)", "test_families.py::test_a_dropout_with_a_hook_that_generation_would_not_call", False),
    Mutant("weights of 8 bits are read", "fastgpt/weights/files.py", "read_weights_of", "tensor.dtype not in _DTYPES", "not tensor.is_floating_point()", "test_convert_files.py::test_numbers_that_no_model_computes_in_are_refused", False),
]  # fmt: skip
