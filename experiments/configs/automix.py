"""AutoMix, SAMix and AdAutoMix beside static mixing; 10,000 training images of Fashion-MNIST.

Command:   python -m experiments.prepare fashion_mnist
           python -m experiments.compare --config=experiments/configs/automix.py --seeds=5
Hardware:  2 CPU cores, about 80 minutes.
Expected:  test accuracy, mean of seeds 0 to 4, 2026-11-22: baseline .882, mixup .867, mixup_weak
           .879, cutmix .864, automix_linear .881, automix .878, automix_mix .859, samix .880,
           adautomix .863; what that says, intervals and figures in docs/comparisons.md.
           On CIFAR-100 in full see cifar100_automix.py.

In the published runs AutoMix's momentum network averages over 1,000 steps, of 100,000 and more;
here over 20, of 1,500.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sla
from saflex_jax import configure
from saflex_jax.methods import automix

PLAIN = {"name": "supervised"}
_DEFAULTS = configure.options(automix.Options())
SAMIX = {k: v for k, v in configure.options(automix.SAMIX).items() if v != _DEFAULTS[k]}


def _automix(**options) -> dict:
    return {"method": {"automix": options}}


def arms(augment: str) -> dict:
    """The arms, with static mixing behind this pipeline; alpha as in OpenMixup's tables.

    With every lambda at the margin, "automix_linear" mixes as mixup does: what AutoMix's two heads
    do without its masks. "automix" and "automix_mix" are the two heads of one training.
    """
    return {
        "baseline": {"method": PLAIN},
        "mixup": {"method": PLAIN, "augment": f"{augment} | mixup(1.0)"},
        "mixup_weak": {"method": PLAIN, "augment": f"{augment} | mixup(0.2)"},
        "cutmix": {"method": PLAIN, "augment": f"{augment} | cutmix(0.2)"},
        "automix_linear": _automix(lam_margin=0.5),
        "automix": _automix(),
        "automix_mix": _automix(predict="mix_q"),
        "samix": _automix(**SAMIX),
        "adautomix": {"method": {"name": "adautomix"}},
    }


def get_config() -> ConfigDict:
    """The config; what is not set here is as in sla.py. Without an arm it trains AutoMix."""
    config = sla.get_config()
    config.augment = "shift(2) | flip(0.5)"
    momentum = {"momentum": 0.95, "momentum_end": 0.999}
    config.method = methods.all_methods("automix", automix=momentum, adautomix=momentum)
    config.arms = arms(config.augment)
    return config
