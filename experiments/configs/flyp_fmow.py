"""FLYP's recipe for FMoW (WILDS): 20 epochs of 256 pairs, weight decay .2.

Command:   python -m experiments.main --config=experiments/configs/flyp_fmow.py
Hardware:  an accelerator with 40 GB, half a day; not run here. `experiments.configs.flyp` says
           which files it needs.
Expected:  published accuracy in %, in distribution / of the worst region out of distribution: FLYP
           68.6 / 41.3 (re-runs of a later paper). Later years are another folder,
           --config.data.test_on=FOLDER.
"""

from ml_collections import ConfigDict

from experiments.configs import flyp


def get_config() -> ConfigDict:
    """The config."""
    return flyp.make("fmow", samples=76_863, epochs=20, batch_size=256, decay=0.2)
