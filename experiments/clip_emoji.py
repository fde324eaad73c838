"""A small CLIP from scratch on one vendor's emoji, tested on another's: right and wrong captions.

    python -m experiments.prepare emoji
    python -m experiments.captions emoji
    python -m experiments.clip_emoji --seeds=3

Prints the accuracy in % of every arm among 24 groups, on the drawings of the other vendor, once
with right captions and once with 30 % of a wrong group. The test set is read once an arm and seed.
Options were chosen on seeds 100 to 102, on right-captioned images of the first vendor in its place
(--select=200 --first=100).
"""

from __future__ import annotations

from absl import app, flags, logging

from experiments import clip, command_line
from experiments.configs import clip_emoji

_SELECT = flags.DEFINE_integer("select", 0, "So many training images stand in for the test set.")


def main(argv: list[str]) -> None:
    """Runs and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    settings = {f"{name} captions": clip_emoji.get_config(name) for name in clip_emoji.CAPTIONS}
    for config in settings.values():
        config.data.select = _SELECT.value
    tests = {"other vendor": {}} if not _SELECT.value else {"same vendor": {}}
    clip.run("clip_emoji", settings, tests)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    command_line.run_absl(main)
