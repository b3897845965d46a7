"""The fault matrix: every row has its tests, wherever in this folder they are.

A row says what a loss is given, or what happens to it, that breaks others. Its tests are listed by
where they run: C on a CPU, I in Triton's interpreter, X compiled or launched without a GPU, G on a
GPU, D in a process group. Names of tests say the row where they were written for it.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
TOKENS, OPERANDS, VALUES = (f"faults/test_{x}.py" for x in ("tokens", "operands", "values"))
GRADIENTS, REFUSALS = "faults/test_gradients.py", "faults/test_refusals.py"
ON_A_GPU, GPU = "gpu/test_fault_rows.py", "gpu/test_on_a_gpu.py"
INTERPRETER = "kernels/interpreter/test_interpreter_{}.py"
COMPILED, LAUNCHED = "kernels/compile/test_compile_kernels.py", "kernels/launch/test_launch_path.py"
FUSED, PEFT = "model/test_fused_lm.py", "model/test_peft.py"


# What `make test` runs in the interpreter too.
INTERPRETED = re.search(
    r"^INTERPRETED := (.*?)(?<!\\)$", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE
)[1].split()


class Row(NamedTuple):
    what: str
    tests: dict[str, list[str]]  # where it runs: "file::test"


def both(test: str) -> dict[str, list[str]]:
    """A test of a backend: it runs on a CPU and in the interpreter."""
    return {"C": [test], "I": [test]}


MATRIX = {
    1: Row("no tokens", {
        "C": [f"{TOKENS}::test_row_01_no_tokens"],
        "I": [f"{TOKENS}::test_row_01_no_tokens"],
        "X": [f"{LAUNCHED}::test_nothing_is_launched_for_nothing"],
    }),
    2: Row("every token masked", both(f"{TOKENS}::test_row_02_every_token_masked") | {
        "D": ["model/test_several_processes.py::test_two_processes_are_one"],
    }),
    3: Row("an empty sequence", both(f"{TOKENS}::test_row_03_an_empty_sequence")),
    4: Row("one mask in numerator and denominator", {
        "C": [f"{TOKENS}::test_row_04_one_mask_in_numerator_and_denominator"],
    }),
    5: Row("ids that are ignored", both(f"{TOKENS}::test_row_05_ids_that_are_ignored")),
    6: Row("an id outside the vocabulary", {
        "C": [f"{TOKENS}::test_row_06_an_id_outside_the_vocabulary_is_an_error",
              "test_device_rules.py::test_a_foreign_id_reaches_no_gather",
              "test_selected_logps.py::test_an_id_that_nobody_looks_at_is_nan_alone"],
        "I": [f"{TOKENS}::test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary"],
        "G": [f"{ON_A_GPU}::test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary"],
    }),
    7: Row("an id among the columns that fill up the last tile", {
        "I": [f"{TOKENS}::test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary",
              INTERPRETER.format("logits_tile")
              + "::test_tile_stats_minus_infinity_extremes_and_foreign_ids"],
        "G": [f"{ON_A_GPU}::test_row_06_07_nobody_looks_at_an_id_outside_the_vocabulary"],
    }),
    8: Row("more numbers than an int32 counts", {
        "X": [f"{COMPILED}::test_rows_are_addressed_in_64_bits"],
        "G": [f"{ON_A_GPU}::test_row_08_more_numbers_than_an_int32_counts",
              f"{GPU}::test_more_logits_than_an_int32_counts"],
    }),
    9: Row("more rows than the second dimension of a grid has", {
        "X": [f"{LAUNCHED}::test_row_09_more_rows_than_a_second_dimension_has",
              f"{LAUNCHED}::test_what_is_planted_is_refused"],
        "G": [f"{ON_A_GPU}::test_row_09_more_rows_and_sequences_than_65535"],
    }),
    10: Row("any strides", both(f"{OPERANDS}::test_row_10_any_strides") | {
        "G": [f"{ON_A_GPU}::test_row_10_13_14_strides_addresses_and_sizes_that_fill_no_tile"],
    }),
    11: Row("an expanded upstream gradient",
            both(f"{OPERANDS}::test_row_11_an_expanded_upstream_gradient")),
    12: Row("an upstream gradient for each token",
            both(f"{OPERANDS}::test_row_12_an_upstream_gradient_for_each_token")),
    13: Row("an odd storage offset", {
        "I": [f"{OPERANDS}::test_row_13_an_odd_storage_offset"],
        "G": [f"{ON_A_GPU}::test_row_10_13_14_strides_addresses_and_sizes_that_fill_no_tile"],
    }),
    14: Row("sizes that fill no tile", {
        "I": [f"{OPERANDS}::test_row_14_sizes_that_fill_no_tile"],
        "G": [f"{ON_A_GPU}::test_row_10_13_14_strides_addresses_and_sizes_that_fill_no_tile",
              f"{ON_A_GPU}::test_row_14_vocabularies_of_models_that_fill_no_tile"],
    }),
    15: Row("a row that is not finite",
            both(f"{VALUES}::test_row_15_a_bad_hidden_state_stays_in_its_row") | {
        "C": [f"{VALUES}::test_row_15_a_bad_row_that_is_left_out",
              f"{VALUES}::test_row_15_a_bad_hidden_state_stays_in_its_row",
              "test_not_finite.py::test_it_shows_in_the_loss_and_in_both_gradients"],
    }),
    16: Row("logits of minus infinity", both(f"{VALUES}::test_row_16_logits_of_minus_infinity")),
    17: Row("all logits far from zero", both(f"{VALUES}::test_row_17_all_logits_far_from_zero")),
    18: Row("a target without a chance", both(f"{VALUES}::test_row_18_a_target_without_a_chance")),
    19: Row("ratios beyond fp32", {
        "C": [f"{GRADIENTS}::test_row_19_ratios_beyond_fp32"],
        "I": [INTERPRETER.format("token_loss")
              + "::test_overflow_is_finite_and_costs_nothing_without_advantage"],
    }),
    # Only the sampler may have none. NaN in old_logps, which the same functions computed, is a
    # fault and shows: a ratio of 1 there would hide it.
    20: Row("a log-prob that the sampler has not", {
        "C": [f"{VALUES}::test_row_20_a_log_prob_that_the_sampler_has_not",
              "test_not_finite.py::test_a_sampler_without_a_log_prob_is_no_fault"],
    }),
    21: Row("every pair of dtypes", both(f"{OPERANDS}::test_row_21_every_pair_of_dtypes") | {
        "C": [f"{OPERANDS}::test_row_21_every_pair_of_dtypes",
              f"{REFUSALS}::test_row_21_a_bias_of_another_dtype",
              f"{REFUSALS}::test_row_21_an_adapter_of_another_dtype",
              f"{REFUSALS}::test_row_21_no_tensor_of_another_kind"],
        "X": [f"{COMPILED}::test_stays_within_the_limits",
              f"{LAUNCHED}::test_every_case_launches"],
    }),
    22: Row("autocast", {
        "C": ["test_autocast.py::test_products_are_of_16_bits_and_the_rest_fp32",
              "test_autocast.py::test_on_a_cpu_it_changes_nothing"],
        "G": [f"{GPU}::test_autocast_gives_products_of_16_bits"],
    }),
    23: Row("sums over chunks in 16 bits", {
        "C": [f"{GRADIENTS}::test_row_23_sums_over_chunks_are_fp32"],
        "G": [f"{ON_A_GPU}::test_row_23_sums_over_chunks_are_fp32"],
    }),
    24: Row("TF32", {
        "X": [f"{COMPILED}::test_fp32_gemm_is_not_tf32"],
        "G": [f"{ON_A_GPU}::test_row_24_fp32_is_not_rounded_to_tf32_unless_pytorch_may"],
    }),
    25: Row("a frozen head, or frozen hidden states", {
        "C": [f"{GRADIENTS}::test_row_25_what_is_frozen_has_no_gradient",
              "test_linear_logps.py::test_only_the_gradients_asked_for_are_made"],
        "G": [f"{GPU}::test_losses"],
    }),
    26: Row("LoRA on the head", {
        "C": [f"{PEFT}::test_lora_on_the_head",
              f"{PEFT}::test_lora_on_the_head_switched_off_and_merged",
              f"{PEFT}::test_what_is_not_plain_lora_is_refused_by_name",
              f"{PEFT}::test_another_kind_of_adapter_on_the_head_is_refused_by_name",
              f"{PEFT}::test_factors_of_lora_are_not_handed_out",
              "integrations/test_trl_trainer.py::test_an_adapter_of_the_head_is_refused_by_trl"],
    }),
    27: Row("tied embeddings", {
        "C": [f"{FUSED}::test_families"],
        "D": ["model/test_several_processes.py::test_two_processes_are_one"],
    }),
    28: Row("a head that is sharded, or was not gathered", {
        "D": [f"{REFUSALS}::test_row_28_no_sharded_tensor",
              f"{REFUSALS}::test_row_28_no_weight_that_was_not_gathered",
              "test_dtensor.py::test_a_tensor_of_a_loss",
              "test_dtensor.py::test_a_tensor_of_log_probs",
              "test_dtensor.py::test_a_head_that_is_sharded"],
    }),
    29: Row("a wrapper that is bypassed", {
        "C": [f"{FUSED}::test_wrapped_models_are_refused_with_the_right_order"],
        "D": ["model/test_several_processes.py::test_two_processes_are_one"],
    }),
    30: Row("unequal counts of tokens", {
        "C": ["test_grpo_loss.py::test_micro_batches_of_any_size_add_up"],
        "D": ["test_normalizer.py::test_averaged_gradients_of_two_ranks_are_those_of_one"],
    }),
    31: Row("tensors on another than the current device", {
        "X": ["kernels/test_launch.py::test_row_31_a_launch_is_on_the_device_of_its_data"],
        "G": [f"{ON_A_GPU}::test_row_31_tensors_on_another_than_the_current_device"],
    }),
    32: Row("another stream than the default one", {
        "G": [f"{ON_A_GPU}::test_row_32_the_current_stream"],
    }),
    33: Row("a CUDA graph", {
        "C": ["test_cuda_graphs.py::test_a_loss",
              "test_cuda_graphs.py::test_log_probs_and_their_backward"],
        "G": [f"{ON_A_GPU}::test_row_33_a_capture_is_refused_and_goes_on",
              f"{GPU}::test_a_capture_is_refused_and_goes_on"],
    }),
    34: Row("torch.compile with shapes that change", {
        "C": [f"{GRADIENTS}::test_row_34_one_graph_for_every_shape",
              f"{GRADIENTS}::test_row_34_every_option_is_compiled_whole",
              "test_ops.py::test_compiled_equals_eager",
              "test_support_logps.py::test_compiled_is_eager_and_compiles_twice_at_most",
              f"{FUSED}::test_it_compiles_whole"],
    }),
    35: Row("two backwards", {
        "C": [f"{GRADIENTS}::test_row_35_two_backwards_and_nothing_is_changed",
              "test_autograd.py::test_several_backwards_with_edits_in_between"],
    }),
    36: Row("second derivatives", {
        "C": [f"{REFUSALS}::test_row_36_no_second_derivative",
              f"{REFUSALS}::test_row_36_no_second_derivative_of_a_model"],
    }),
    37: Row("scoring, and checkpoints", {
        "C": [f"{GRADIENTS}::test_row_37_scoring_makes_no_gradient",
              "test_autograd.py::test_saved_tensors_are_unpacked_once",
              f"{FUSED}::test_the_model_checkpoints_within"],
    }),
    38: Row("a loss scaler", {
        "C": [f"{GRADIENTS}::test_row_38_gradients_are_linear_in_the_upstream_gradient",
              "test_grpo_loss.py::test_a_gradient_that_only_survives_scaled"],
    }),
    39: Row("the same bits again", {
        "C": [f"{GRADIENTS}::test_row_39_the_same_bits_again",
              f"{GRADIENTS}::test_row_39_the_same_bits_after_a_restart"],
        "G": [f"{ON_A_GPU}::test_row_39_the_same_bits_a_hundred_times",
              f"{ON_A_GPU}::test_row_39_the_same_bits_after_a_restart"],
    }),
    40: Row("a row in another batch", {
        "C": ["test_linear_logps.py::test_a_row_does_not_depend_on_the_batch_around_it"],
        "I": [INTERPRETER.format("linear_logps") + "::test_a_row_does_not_depend_on_its_batch"],
        "G": [f"{GPU}::test_a_row_has_the_same_bits_in_any_batch"],
    }),
    41: Row("temperatures", {
        "C": [f"{REFUSALS}::test_row_41_temperatures_that_are_refused",
              f"{REFUSALS}::test_row_41_a_model_refuses_them_too",
              f"{VALUES}::test_row_41_a_temperature_for_each_token"],
    }),
    42: Row("Triton's cache on a network file system", {
        "C": ["faults/test_matrix.py::test_row_42_the_page_says_where_caches_go"],
    }),
    43: Row("kernels that do not fit", {
        "C": ["test_dispatch.py::test_auto_degrades_to_torch_and_remembers",
              "test_device_rules.py::test_auto_takes_the_kernels_where_they_run"],
        "X": [f"{COMPILED}::test_stays_within_the_limits",
              f"{LAUNCHED}::test_what_is_planted_is_refused"],
        "G": [f"{ON_A_GPU}::test_row_43_kernels_that_do_not_fit"],
    }),
    44: Row("a transform of the logits that nobody knows", {
        "C": [f"{REFUSALS}::test_row_44_a_transform_of_the_logits_that_nobody_knows",
              f"{FUSED}::test_a_head_that_the_config_does_not_describe_is_refused"],
    }),
}  # fmt: skip


@functools.cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    """The functions of a test module, as pytest collects them, without importing it."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {x.name: x for x in tree.body if isinstance(x, ast.FunctionDef)}


def test_the_matrix_has_44_rows():
    assert list(MATRIX) == list(range(1, 45))


@pytest.mark.parametrize(
    "row", MATRIX.values(), ids=[f"{number:02d} {row.what}" for number, row in MATRIX.items()]
)
def test_the_tests_of_a_row_exist_and_run_where_it_says(row):
    assert any(row.tests.values())
    for where, tests in row.tests.items():
        for test in tests:
            path, name = test.split("::")
            assert name.startswith("test_") and name in functions(path), test
            if where == "I":
                assert f"tests/{path}".startswith(tuple(INTERPRETED)), test
                given = {x.arg for x in functions(path)[name].args.args}
                assert path.startswith("kernels/interpreter") or "backend" in given, test
            assert (where == "G") == path.startswith("gpu/"), test
            assert where != "X" or path.startswith("kernels/"), test


def test_a_test_that_names_a_row_is_listed_there():
    for path in TESTS.rglob("test_*.py"):
        relative = path.relative_to(TESTS).as_posix()
        for name in functions(relative):
            numbers = re.match(r"test_row((?:_\d\d)+)_", name)
            for number in re.findall(r"\d\d", numbers[1]) if numbers else ():
                listed = sum(MATRIX[int(number)].tests.values(), [])
                assert f"{relative}::{name}" in listed, name


def test_row_42_the_page_says_where_caches_go():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.partition("## Triton's cache\n")[2].partition("\n## ")[0]
    for words in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "network file system", "fastgrpo.doctor"):
        assert words in section, words
