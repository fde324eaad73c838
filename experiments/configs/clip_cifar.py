"""CIFAR-10 with captions by people: a pretrained image tower, a locked sentence encoder.

Command:   python -m experiments.clip_cifar
Hardware:  2 CPU cores, under 10 minutes.
Expected:  see docs/clip.md, which that command printed.

Images are features of a ResNet-18, captions are of the class that one annotator of CIFAR-10N saw
("worst": 40 % are wrong) or of the right one, in one of five templates. What trains is the
projection of the features into the sentence encoder's space, and the scale.
"""

from ml_collections import ConfigDict

from experiments.arms import STANDING
from experiments.configs import digits, methods, sources
from experiments.pretrained_tasks import LEARNING_RATE, STEPS

# Where the captions come from -> labels of CIFAR-10N.
CAPTIONS = {"right": "", "worst": "worst"}
TEXT = {"depth": 0, "projected": False}
FLYP = {"name": "flyp", "flyp": {"embed_dim": 384, "text": TEXT}}


def _arm(rule: str = "as_given", loss: str = "contrastive", **data) -> dict:
    method = FLYP | {"rule": rule, "flyp": FLYP["flyp"] | {"loss": loss}}
    return {"method": method, "data": {"train_on_val": True} | data}


ARMS = {
    "flyp": _arm(),
    "linear_probe": {
        "method": {"name": "supervised", "rule": "as_given"},
        "data": {"train_on_val": True},
    },
    "trusted_only": _arm(**STANDING["trusted_only"]["data"]),
    "class_prompts": _arm(loss="class_prompts"),
    "saflex": _arm("saflex"),
    "saflex_class_prompts": _arm("saflex", "class_prompts"),
}


def get_config(captions: str = "worst") -> ConfigDict:
    """The config with its arms.

    Args:
      captions: of CAPTIONS.
    """
    config = digits.get_config()
    config.data = sources.section(
        "cifar10n", features="crop", captions="cifar10n", val=500, labels=CAPTIONS[captions]
    )
    config.augment = "view"
    config.model = {"name": "mlp", "widths": ()}
    config.optimizer.learning_rate = LEARNING_RATE
    # 1e-2 is 1.4 points worse for FLYP with worst captions, the same for SAFLEX (seeds 100, 101).
    config.optimizer.weight_decay = 1.0
    config.method = methods.all_methods("flyp", "saflex", flyp=FLYP["flyp"])
    config.train = {
        "steps": STEPS, "batch_size": 256, "val_batch_size": 256, "log_every": STEPS // 10,
        "checkpoint_every": STEPS, "keep_best": False,
    }  # fmt: skip
    config.arms = ARMS
    return config
