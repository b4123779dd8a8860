"""The flags of diffusers' training scripts, and the settings that they are here.

A recipe's command line takes `--learning_rate 1e-4`, `--learning_rate=1e-4` and bare flags such as `--use_ema` for the
`key=value` that they stand for, says on standard error what each has set, and lists them all in its --help.

A dotted name may begin with `*.` where the group differs between recipes: it means the one setting of the recipe that
ends so.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence

from inflate.errors import ConfigError

CONFIG = "--config"
"""Names a YAML file, which may also be given by itself."""
WIDTH = 41
"""Column of the settings in the table of flags."""

VALUES: dict[str, tuple[str, ...]] = {
    "--pretrained_model_name_or_path": ("model.path",),
    "--train_data_dir": ("data.path",),
    "--num_frames": ("data.frames",),
    "--height": ("data.height",),
    "--width": ("data.width",),
    "--resolution": ("data.height", "data.width"),
    "--dataloader_num_workers": ("training.workers",),
    "--output_dir": ("training.output",),
    "--seed": ("training.seed",),
    "--max_train_steps": ("training.steps",),
    "--train_batch_size": ("training.batch",),
    "--gradient_accumulation_steps": ("training.accumulate",),
    "--mixed_precision": ("training.precision",),
    "--learning_rate": ("training.lr",),
    "--lr_scheduler": ("training.schedule",),
    "--lr_warmup_steps": ("training.warmup",),
    "--adam_weight_decay": ("training.weight_decay",),
    "--max_grad_norm": ("training.gradient_clip",),
    "--checkpointing_steps": ("training.checkpoint_every",),
    "--checkpoints_total_limit": ("training.keep",),
    "--resume_from_checkpoint": ("training.resume",),
    "--report_to": ("training.tracker",),
    "--validation_steps": ("training.preview_every",),
    "--noise_aug_strength": ("sampling.noise_aug",),
    "--rank": ("*.rank",),
    "--lora_alpha": ("*.alpha",),
}
"""Flags that take a value, and the settings that it goes to."""

BARE: dict[str, tuple[str, str]] = {
    "--use_ema": ("training.ema", "0.9999"),  # the decay is that of diffusers' EMAModel
    "--gradient_checkpointing": ("memory.recompute", "units"),
    "--use_8bit_adam": ("training.optimizer", "adamw8bit"),
}
"""Flags without a value, and what they set to which value."""

FORMERLY: dict[str, tuple[str, dict[object, str]]] = {
    "gradient_checkpointing": ("memory.recompute", {True: "units", False: "nothing"}),
}
"""The last words of settings that earlier versions had, what they are called now, and their values there."""

RENAMED: dict[str, dict[str, str]] = {
    "--lr_scheduler": {"constant_with_warmup": "constant"},  # the warm-up is a setting of its own here
}
"""Values that are called differently here."""

WITHOUT: dict[str, str] = {
    "--adam_beta1": "set both of them, as training.betas=[0.9,0.999]",
    "--adam_beta2": "set both of them, as training.betas=[0.9,0.999]",
    "--adam_epsilon": "it is PyTorch's",
    "--allow_tf32": "set torch.backends.cuda.matmul.allow_tf32 in the recipe's script",
    "--enable_xformers_memory_efficient_attention": "PyTorch's own attention is as sparing; leave it out",
    "--hub_model_id": "upload the run's export yourself",
    "--num_train_epochs": "set training.steps, in optimiser steps",
    "--push_to_hub": "upload the run's export yourself",
    "--validation_image": "previews animate held-out clips; see data.held_out",
    "--validation_images": "previews animate held-out clips; see data.held_out",
    "--validation_prompt": "previews animate held-out clips; see data.held_out",
    "--validation_prompts": "previews animate held-out clips; see data.held_out",
    "--variant": "the precision of the files is found by itself; leave it out",
}
"""Flags that nothing here does the work of, and what to do instead."""


def translate(arguments: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each argument as it was written, and the YAML file or the `key=value` that it stands for.

    names: the dotted names of the recipe's settings. What does not begin with a dash stands for itself, `--config FILE`
    for FILE. Raises ConfigError for a flag that is not known, has no equivalent, lacks its value or has one too many.
    """
    words = iter(arguments)
    for word in words:
        flag, joined, value = word.partition("=")
        if not flag.startswith("-"):
            yield word, [word]
            continue
        settings, fixed = _meaning(word, names)
        if fixed is not None and joined:
            raise ConfigError(f"{word}: {flag} takes no value; write {settings[0]}={value}")
        if fixed is None and not joined:
            value = _following(flag, words)
            word = f"{flag} {value}"
        value = RENAMED.get(flag, {}).get(value, value) if fixed is None else fixed
        yield word, [f"{setting}={value}" for setting in settings] or [value]


def table(names: Sequence[str]) -> str:
    """One aligned line for each flag that a recipe with these settings takes, with what it sets."""
    lines = []
    for words in [*([flag, "VALUE"] for flag in VALUES), *([flag] for flag in BARE)]:
        try:
            ((written, meant),) = translate(words, names)
        except ConfigError:  # this recipe has no such setting
            continue
        lines.append(f"{written:{WIDTH}}  {' '.join(meant)}\n")
    return "".join(lines)


def _meaning(word: str, names: Sequence[str]) -> tuple[list[str], str | None]:
    """The settings that a flag is for (none: it names a file), and the value of a flag that takes none."""
    flag = word.partition("=")[0]
    if flag == CONFIG:
        return [], None
    if flag in WITHOUT:
        raise ConfigError(f"{flag}: has no equivalent: {WITHOUT[flag]}")
    if flag in BARE:
        setting, value = BARE[flag]
        return [_setting(flag, setting, names)], value
    if flag in VALUES:
        return [_setting(flag, setting, names) for setting in VALUES[flag]], None
    near = difflib.get_close_matches(flag, [*VALUES, *BARE, *WITHOUT], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{word}: settings are written key=value, without dashes (--help lists them){hint}")


def _setting(flag: str, pattern: str, names: Sequence[str]) -> str:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ConfigError(f"{flag}: has no equivalent in this recipe, which has no setting {pattern}")
    if len(found) > 1:
        raise ConfigError(f"{flag}: could be {' or '.join(found)}; write the one you mean as key=value")
    return found[0]


def _following(flag: str, words: Iterator[str]) -> str:
    value = next(words, "--")
    if value.startswith("--"):
        raise ConfigError(f"{flag}: {'name a YAML file' if flag == CONFIG else 'give its value'} after it")
    return value
