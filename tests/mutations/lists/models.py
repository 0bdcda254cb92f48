"""Breakages of models in and out: what is loaded, what of it is trained, what a run exports."""

from tests.mutations.mutation import Mutation

PRETRAINED, EXPORT = "tests/models/test_pretrained.py", "tests/training/test_export.py"
PROCESSES = f"{EXPORT}::test_what_processes_train_together_is_exported_as_by_one"

MUTATIONS = (
    Mutation(
        name="missing-weights-are-random",
        file="toolkit/models/pretrained.py",
        line="if missing:",
        becomes="if False:",
        tests=(f"{PRETRAINED}::test_wrong_folders",),
    ),
    Mutation(
        name="sampled-with-the-models-penalties",
        file="toolkit/models/pretrained.py",
        line="_sample_what_is_scored(lm)",
        becomes="pass",
        tests=(f"{PRETRAINED}::test_tokens_are_sampled_as_they_are_scored_whatever_the_model_is_usually_sampled_with",),
    ),
    Mutation(
        name="adapters-not-trained-further",
        file="toolkit/models/lora.py",
        line="return _quietly(peft.PeftModel.from_pretrained, lm, path, is_trainable=True)",
        becomes="return _quietly(peft.PeftModel.from_pretrained, lm, path)",
        tests=(f"{PRETRAINED}::test_saved_adapters_are_loaded_on_their_model_and_trained_further",),
    ),
    Mutation(
        name="alpha-is-dropped",
        file="toolkit/models/lora.py",
        line="lora_alpha=config.alpha,",
        becomes="lora_alpha=config.r,",
        tests=(f"{PRETRAINED}::test_new_adapters_change_nothing_and_are_all_that_is_trained",),
    ),
    Mutation(
        name="pad-token-replaced",
        file="toolkit/models/tokenizer.py",
        line="if tokenizer.pad_token_id is None:",
        becomes="if True:",
        tests=(f"{PRETRAINED}::test_a_tokenizer_without_a_token_to_pad_with",),
    ),
    Mutation(
        name="reference-is-the-policy",
        file="toolkit/training/reference.py",
        line="self._assign(self._kept)",
        becomes="pass",
        tests=(f"{EXPORT}::test_the_reference_is_the_policy_as_it_was",),
    ),
    Mutation(
        name="reference-stays-in-force",
        file="toolkit/training/reference.py",
        line="self._assign(current)",
        becomes="pass",
        tests=(f"{EXPORT}::test_the_reference_is_the_policy_as_it_was",),
    ),
    Mutation(
        name="checkpoint-holds-the-model-of-adapters",
        file="toolkit/training/checkpoint.py",
        line="return has_adapters(unwrapped(trainer.policy).lm)",
        becomes="return False",
        tests=(f"{EXPORT}::test_a_checkpoint_holds_the_adapters_alone",),
    ),
    Mutation(
        name="no-model-after-ctrl-c",
        file="toolkit/training/checkpoint.py",
        line='if export == "checkpoints" or (export == "end" and is_last):',
        becomes='if export == "checkpoints" or (export == "end" and is_last and phase.name == "main"):',
        tests=(f"{EXPORT}::test_when_the_model_is_written",),
    ),
    Mutation(
        name="merging-changes-the-policy",
        file="toolkit/training/export.py",
        line="lm = lora.on_cpu(lm)",
        becomes="pass",
        tests=(f"{EXPORT}::test_adapters",),
    ),
    Mutation(
        name="old-model-goes-first",
        file="toolkit/training/export.py",
        line='fresh = output_dir / f"{MODEL}.writing"',
        becomes="fresh = output_dir / MODEL",
        tests=(f"{EXPORT}::test_a_crash_while_writing_leaves_the_older_model",),
    ),
    Mutation(
        name="sharded-weights-not-read-into-the-merged-model",
        file="toolkit/training/export.py",
        line="lm.load_state_dict(weights, assign=True)",
        becomes="lm.to_empty(device='cpu')",
        tests=(PROCESSES,),
    ),
    Mutation(
        name="relative-base-of-adapters",
        file="toolkit/training/export.py",
        line="settings.base_model_name_or_path = str(base.resolve())",
        becomes="pass",
        tests=(f"{EXPORT}::test_the_base_of_adapters_is_named_by_its_full_path",),
    ),
    Mutation(
        name="frozen-head-is-trained",
        file="toolkit/models/pretrained.py",
        line="policy.head.module.requires_grad_(False)",
        becomes="pass",
        tests=(f"{PRETRAINED}::test_a_frozen_head",),
    ),
)
