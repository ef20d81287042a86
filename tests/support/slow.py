"""Tests that take seconds beside quicker ones of the same promise: `make test-all` runs them, `make test` does not.

Chosen by `--durations=0` of a whole run on two cores. Tests that are slow by their nature (a true size, many kills)
bear the mark `slow` where they stand.
"""

from __future__ import annotations

from collections.abc import Iterable

# Which cases of a test stay in `make test`, by how their names begin; none of the others, and none of an empty list.
KEPT: dict[str, tuple[str, ...]] = {
    "test_blocks.py::test_a_block_runs_as_it_stands": (
        "README.md",
        "in_python.md",
        "surgery.md",
        "trainers.md:quick",
    ),
    "test_blocks.py::test_the_tutorial_runs": (),
    "test_faults.py::test_the_disk_becomes_full": (),
    "adapter/test_adapters.py::test_a_trainable_adapter_can_be_loaded_to_go_on": (
        "LoRA on fused experts",
        "everything together",
    ),
    "adapter/test_adapters.py::test_every_way_of_training_comes_back_and_merges": (
        "LoRA on fused experts",
        "a whole new module in full",
        "bare parameter beside LoRA",
        "everything together",
    ),
    "adapter/test_configured.py::test_floats_of_other_widths_are_merged_rightly": (
        "dtype0-LoRA",
        "dtype1-DoRA",
        "dtype2-experts",
        "dtype0-in full",
        "dtype1-embeddings",
    ),
    "adapter/test_configured.py::test_tensors_that_do_not_fit_are_told": ("LoRA", "experts", "in full"),
    "adapter/test_data_starts.py::test_what_is_trained_is_saved_loaded_and_merged": ("lora_ga",),
    "adapter/test_quantized.py::test_evas_start_leaves_packed_weights_alone": (),
    "adapter/test_ranks.py::test_adapters_of_different_ranks_are_summed_saved_and_merged": ("cat",),
    "adapter/test_ranks.py::test_an_adapter_on_a_merged_artifact_of_another_has_another_rank_and_more_targets": (),
    "adapter/test_saving.py::test_heads_and_modules_of_the_same_names_come_back": ("LlamaForCausal",),
    "adapter/test_several.py::test_merging_one_by_name_merges_that_one": (
        "parameters",
        "modules-one",
    ),
    "adapter/test_starts.py::test_a_fresh_process_computes_the_same": (),
    "adapter/test_starts.py::test_what_is_trained_is_saved_loaded_and_merged": (
        "rslora, ranks",
        "GPT-2-olora",
    ),
    "adapter/test_tokens.py::test_a_whole_life": ("tied",),
    "artifact/test_large.py::test_it_is_the_artifact_that_is_built_in_memory": ("memory-renaming",),
    "checks/test_chance.py::test_chance_of_any_kind_is_no_fault": (
        "bernoulli",
        "path",
        "permuted",
        "lstm",
    ),
    "checks/test_check.py::test_a_whole_run_holds": (),
    "clients/test_loading_options.py::test_saved_again_it_reloads_in_a_fresh_process": (),
    "command/test_starting.py::test_a_draft_for_any_family_is_planned_as_it_is": ("mixtral", "t5", "vit", "wav2vec2"),
    "exporting/test_expert_adapter.py::test_every_layout_is_read_as_the_adapter_that_it_was": (
        "lora-olmoe",
        "rslora-mixtral",
    ),
    "exporting/test_precision.py::test_a_merged_plain_model_is_packed_and_no_base_to_merge_into": (),
    "exporting/test_precision.py::test_a_packed_artifact_loads_by_transformers_as_it_stands": ("nf4",),
    "exporting/test_precision.py::test_layers_whose_weights_are_read_past_them_are_not_packed": ("int8",),
    "exporting/test_precision.py::test_numbers_that_are_too_large_for_it_are_refused": ("float16",),
    "exporting/test_precision.py::test_packed_weights_that_are_not_the_artifacts_do_not_appear": ("absmax",),
    "healing/test_align.py::test_streamed_equals_whole": ("healed",),
    "merging/test_agreement.py::test_right_merges_are_accepted": ("plain", "embeddings", "large"),
    "merging/test_agreement.py::test_wrong_merges_are_refused": (
        "one_percent",
        "turned",
    ),
    "merging/test_export.py::test_a_merge_that_is_wrong_does_not_appear": ("dtype0-one_percent", "dtype4-one_percent"),
    "merging/test_merging.py::test_bit_identical_to_peft_in_memory": ("dtype0-hub", "dtype1-memory"),
    "model/test_behaviour.py::test_a_fault_in_a_feed_forward_is_named": ("Llama", "GPT-2"),
    "model/test_behaviour.py::test_a_fault_in_an_attention_is_named": ("Llama", "GPT-2"),
    "modules/test_draft_head.py::test_a_trained_head_is_accepted_more_often": ("medusa",),
    "modules/test_window_attention.py::test_a_window_of_the_length_is_the_original_bit_for_bit": (
        "llama",
        "gemma3",
        "gpt2",
    ),
    "objective/test_engine.py::test_a_compiled_model_gives_the_same_gradients": (),
    "on_ramps/test_hard_modules.py::test_recurrent_layers_come_back_and_learn": ("lstm",),
    "on_ramps/test_part_by_part.py::test_it_learns_and_merges_and_loads_alone": (),
    "on_ramps/test_part_by_part.py::test_it_needs_no_argument_and_comes_back": (
        "featured",
        "grown",
        "one module",
    ),
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
    "recipe/test_healing.py::test_layers_are_chosen_anew_for_other_code": (),
    "recipe/test_interrupted.py::test_a_failed_run_keeps_its_words": (),
    "recipe/test_interrupted.py::test_an_adapter_that_was_not_loaded_again_is_not_finished": (),
    "recipe/test_interrupted.py::test_an_older_checkpoint_goes_when_the_newer_is_on_the_disk": (),
    "recipe/test_interrupted.py::test_what_a_fresh_process_finds_later_is_not_forgotten": (),
    "recipe/test_interrupted.py::test_what_failed_in_training_is_not_forgotten": ("False",),
    "recipe/test_json_schema.py::test_a_schema_without_a_rule_is_found_to_differ": (
        "Adapter",
        "Data",
    ),
    "recipe/test_plain_lora.py::test_a_run_with_another_start_that_was_stopped_goes_on_to_the_same_bits": (),
    "recipe/test_prefix.py::test_an_interrupted_training_goes_on_to_the_same_bits": (),
    "recipe/test_trainers.py::test_a_run_ends_with_a_report_and_is_not_repeated": (),
    "recipe/test_trainers.py::test_the_model_term_alone_is_trls_own_trainer": (
        "sft",
        "dpo",
    ),
    "surgery/test_cache_state.py::test_an_artifact_generates_right_without_us": (),
    "surgery/test_cache_state.py::test_it_generates_with_the_cache_what_it_generates_without": ("mistral",),
    "surgery/test_further_experts.py::test_a_number_that_is_read_from_the_configuration_changes_for_all_blocks": (),
    "surgery/test_further_experts.py::test_a_pruned_model_comes_back_in_a_fresh_process": ("deepseek_v4",),
    "surgery/test_further_experts.py::test_one_block_alone_comes_back_too": (),
    "surgery/test_grouped_experts.py::test_blocks_with_other_numbers_of_groups_say_so_themselves": (),
    "surgery/test_masks.py::test_a_change_moves_exactly_what_the_mask_lets_see_it": ("llama",),
    "system/test_alone.py::test_a_process_that_began_early_is_had_by_who_asks_first": (),
    "system/test_processes.py::test_a_killed_training_resumes_to_the_same_bits": (),
    "system/test_processes.py::test_no_process_waits_for_one_that_is_gone": (),
    "system/test_processes.py::test_two_processes_make_what_one_makes": (),
    "training/test_batching.py::test_a_resumed_training_goes_on_in_the_order_that_it_had": (),
    "training/test_distilling.py::test_a_student_with_an_added_head_learns_from_what_it_reads": (),
    "training/test_distilling.py::test_activation_checkpointing_changes_nothing": (),
    "training/test_distilling.py::test_the_gradient_does_not_depend_on_the_split": ("all together",),
    "training/test_groups.py::test_a_resumed_training_keeps_its_groups": (),
    "training/test_groups.py::test_every_optimizer_that_transformers_makes_takes_groups": (
        "adamw_torch",
        "rmsprop",
    ),
    "training/test_preference.py::test_a_mean_over_tokens_counts_by_tokens": (),
    "training/test_preference.py::test_a_resumed_training_keeps_its_reference": (),
    "training/test_preference.py::test_activation_checkpointing_changes_nothing": (),
    "training/test_preference.py::test_what_is_frozen_inside_a_trained_copy_stays_frozen": (),
    "training/test_preference.py::test_what_was_trained_is_saved_without_the_copy": (),
    "training/test_prefix.py::test_a_cached_prefix_changes_no_bit": (
        "LoRA on the last layer",
        "a replaced module",
    ),
    "training/test_prefix.py::test_preferences_and_their_reference_share_a_prefix": (),
    "training/test_prefix.py::test_what_is_kept_outlives_an_interruption": (),
    "training/test_reinforcing.py::test_a_step_may_read_part_of_what_was_written": (),
    "training/test_reinforcing.py::test_the_gradient_does_not_depend_on_the_split": ("dapo",),
    "training/test_reports.py::test_wandb": (),
    "training/test_resume.py::test_a_resumed_training_ends_where_an_uninterrupted_one_does": (
        "LoRA, a module",
        "a start",
    ),
    "training/test_rewarding.py::test_a_resumed_training_ends_where_an_uninterrupted_one_does": (),
    "training/test_short_runs.py::test_a_short_run_without_evaluation_data_is_no_failure": (),
    "training/test_short_runs.py::test_the_last_step_is_logged_whatever_the_interval": (),
    "training/test_teaching.py::test_a_resumed_training_writes_what_it_would_have_written": (),
    "training/test_teaching.py::test_activation_checkpointing_changes_nothing": (),
    "training/test_trainer.py::test_the_gradient_does_not_depend_on_the_split": ("all together",),
    "training/test_trainer.py::test_trls_trainer_gives_the_same_gradients": ("a user's",),
    "training/test_unpaired.py::test_a_resumed_training_ends_where_an_uninterrupted_one_does": (),
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
