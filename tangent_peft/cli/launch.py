"""`tangent-peft train --accelerate_config ENGINE`: the same training in several processes, by `accelerate launch`.

As with TRL's `trl dpo --accelerate_config`, options of the launcher stand among those of the training: what the
training does not know is the launcher's.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.commands.launch import launch_command, launch_command_parser

from tangent_peft.cli.train_options import find_recipe, train_parser


OPTION = "--accelerate_config"


def launch_training(arguments: Sequence[str]) -> None:
    """Runs `tangent-peft train` in the processes that `--accelerate_config` and the launcher's options describe.

    Args:
        arguments: what follows `tangent-peft train` on the command line.

    Raises:
        FileNotFoundError: if the configuration is neither a file nor the name of a packaged one.
        ValueError: for an option that neither the training nor the launcher knows.
    """
    launch_command(launch_command_parser().parse_args(launcher_arguments(arguments)))


def launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """What follows `accelerate launch`: the launcher's options, the module to run, and the training's options."""
    groups = _groups(arguments)
    engine = [group for group in groups if group[0].split("=")[0] == OPTION]
    values = [word for group in engine for word in (group[1:] or group[0].split("=")[1:])]
    if len(engine) != 1 or len(values) != 1:
        raise ValueError(f"{OPTION} takes one value, a file or the name of a packaged one; found {values}.")
    ours, theirs = train_parser()._option_string_actions, launch_command_parser()._option_string_actions
    launcher, training = ["--config_file", str(find_recipe(values[0], "accelerate"))], []
    for group in groups:
        name = group[0].split("=")[0]
        if group in engine:
            continue
        foreign = name.startswith("--") and name not in ours and name != "--config"
        if foreign and name in theirs:
            launcher += group
        else:  # what nobody knows as well: it is refused where the training's options are read
            training += group
    return [*launcher, "--module", "tangent_peft.cli.main", "train", *training]


def _groups(arguments: Sequence[str]) -> list[list[str]]:
    """Each option with its values; what stands before the first option is a group of its own."""
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups
