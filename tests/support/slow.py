"""Tests that take seconds beside quicker ones of the same promise: `make test-all` runs them, `make test` does not.

Chosen by `--durations=0` of a whole run on two cores. Tests that are slow by their nature (a true size, many kills)
bear the mark `slow` where they stand.
"""

from __future__ import annotations

from collections.abc import Iterable

# Which cases of a test stay in `make test`, by how their names begin; none of the others, and none of an empty list.
KEPT: dict[str, tuple[str, ...]] = {
    "test_blocks.py::test_a_block_runs_as_it_stands": ("README.md", "in_python.md", "surgery.md", "trainers.md:quick"),
    "test_blocks.py::test_the_tutorial_runs": (),
    "adapter/test_adapters.py::test_every_way_of_training_comes_back_and_merges": (
        "LoRA on fused experts",
        "a whole new module in full",
        "bare parameter beside LoRA",
        "everything together",
    ),
    "adapter/test_adapters.py::test_a_trainable_adapter_can_be_loaded_to_go_on": (
        "LoRA on fused experts",
        "everything together",
    ),
    "adapter/test_saving.py::test_heads_and_modules_of_the_same_names_come_back": ("LlamaForCausal",),
    "adapter/test_several.py::test_merging_one_by_name_merges_that_one": ("parameters", "modules-one"),
    "adapter/test_data_starts.py::test_what_is_trained_is_saved_loaded_and_merged": ("lora_ga",),
    "adapter/test_starts.py::test_what_is_trained_is_saved_loaded_and_merged": ("rslora, ranks", "GPT-2-olora"),
    "adapter/test_tokens.py::test_a_whole_life": ("tied",),
    "artifact/test_large.py::test_it_is_the_artifact_that_is_built_in_memory": ("memory-renaming",),
    "checks/test_chance.py::test_chance_of_any_kind_is_no_fault": ("bernoulli", "path", "permuted", "lstm"),
    "exporting/test_precision.py::test_a_packed_artifact_loads_by_transformers_as_it_stands": ("nf4",),
    "exporting/test_precision.py::test_numbers_that_are_too_large_for_it_are_refused": ("float16",),
    "exporting/test_precision.py::test_packed_weights_that_are_not_the_artifacts_do_not_appear": ("absmax",),
    "merging/test_agreement.py::test_wrong_merges_are_refused": ("one_percent", "turned"),
    "modules/test_draft_head.py::test_a_trained_head_is_accepted_more_often": ("medusa",),
    "modules/test_window_attention.py::test_a_window_of_the_length_is_the_original_bit_for_bit": (
        "llama",
        "gemma3",
        "gpt2",
    ),
    "objective/test_engine.py::test_a_compiled_model_gives_the_same_gradients": (),
    "on_ramps/test_part_by_part.py::test_it_learns_and_merges_and_loads_alone": (),
    "on_ramps/test_part_by_part.py::test_it_needs_no_argument_and_comes_back": ("featured", "grown", "one module"),
    "on_ramps/test_wrapping.py::test_inputs_that_a_file_does_not_align_are_those_of_memory": ("8",),
    "recipe/test_calibration.py::test_a_recipe_keeps_the_best_experts_by_its_data": ("reap",),
    "recipe/test_calibration.py::test_a_recipe_merges_alike_experts_by_how_often_they_are_chosen": (),
    "recipe/test_data.py::test_a_recipe_trains_on_every_format": ("packed",),
    "recipe/test_data_facts.py::test_a_module_that_changes_is_built_anew_by_resume": (),
    "recipe/test_data_facts.py::test_the_other_templates_of_a_base_stay": ("files",),
    "recipe/test_data_facts.py::test_what_a_head_learns_stands_in_its_configuration": ("multi_label",),
    "recipe/test_expert_lora.py::test_with_bf16_it_trains_a_base_of_float32": (),
    "recipe/test_healing.py::test_a_resumed_run_reports_the_layers_that_were_chosen_before": (),
    "recipe/test_healing.py::test_a_run_places_aligns_distils_and_resumes": (),
    "recipe/test_healing.py::test_layers_are_chosen_anew_for_other_code": ("True",),
    "recipe/test_interrupted.py::test_an_adapter_that_was_not_loaded_again_is_not_finished": (),
    "recipe/test_interrupted.py::test_what_a_fresh_process_finds_later_is_not_forgotten": ("False",),
    "recipe/test_interrupted.py::test_what_failed_in_training_is_not_forgotten": ("False",),
    "recipe/test_plain_lora.py::test_a_run_with_another_start_that_was_stopped_goes_on_to_the_same_bits": (),
    "recipe/test_prefix.py::test_an_interrupted_training_goes_on_to_the_same_bits": (),
    "recipe/test_trainers.py::test_the_model_term_alone_is_trls_own_trainer": ("sft", "dpo"),
    "surgery/test_cache_state.py::test_an_artifact_generates_right_without_us": ("gemma3",),
    "surgery/test_masks.py::test_a_change_moves_exactly_what_the_mask_lets_see_it": ("llama", "gemma3", "gpt2"),
    "system/test_processes.py::test_a_killed_training_resumes_to_the_same_bits": (),
    "system/test_processes.py::test_two_processes_make_what_one_makes": (),
    "training/test_distilling.py::test_the_gradient_does_not_depend_on_the_split": ("all together",),
    "training/test_reinforcing.py::test_the_gradient_does_not_depend_on_the_split": ("dapo",),
    "training/test_reports.py::test_wandb": (),
    "training/test_short_runs.py::test_a_short_run_without_evaluation_data_is_no_failure": (),
    "training/test_trainer.py::test_the_gradient_does_not_depend_on_the_split": ("all together",),
    "training/test_trainer.py::test_trls_trainer_gives_the_same_gradients": ("a user's",),
    "training/test_unpaired.py::test_the_loss_is_trls_own_in_one_micro_batch_and_not_in_several": (),
}


def is_slow(test: str, case: str) -> bool:
    """Returns whether a case of a test (its file below `tests/`, and its name) is left to `make test-all`."""
    return test in KEPT and not (KEPT[test] and case.startswith(KEPT[test]))


def find_missed(cases: Iterable[tuple[str, str]]) -> list[str]:
    """Returns which beginnings no case has, of those tests that the cases (test and name) are of."""
    names: dict[str, list[str]] = {}
    for test, case in cases:
        names.setdefault(test, []).append(case)
    return [
        f"{test}[{beginning}"
        for test in KEPT.keys() & names.keys()
        for beginning in KEPT[test]
        if not any(case.startswith(beginning) for case in names[test])
    ]
