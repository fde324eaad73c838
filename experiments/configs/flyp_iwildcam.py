"""FLYP's recipe for iWildCam (WILDS): 20 epochs of 256 pairs, weight decay .2.

Command:   python -m experiments.main --config=experiments/configs/flyp_iwildcam.py
Hardware:  an accelerator with 40 GB, half a day; not run here. `experiments.configs.flyp` says
           which files it needs.
Expected:  published macro-F1 in %, in distribution / on cameras that were not seen: FLYP
           52.2 / 35.6 (re-runs of a later paper). Of the latter, --config.data.test_on=FOLDER.
"""

from ml_collections import ConfigDict

from experiments.configs import flyp


def get_config() -> ConfigDict:
    """The config."""
    return flyp.make("iwildcam", samples=129_809, epochs=20, batch_size=256, decay=0.2)
