"""A long tail: Fashion-MNIST from 5,000 images of the first class down to 50 of the last.

Command:   python -m experiments.prepare fashion_mnist
           python -m experiments.compare --config=experiments/configs/sla_imbalanced.py --seeds=5
Hardware:  2 CPU cores, about 15 minutes (estimated from single steps).
Expected:  not run here. For orientation, on CIFAR-10 with this ratio and a ResNet-32 the SLA paper
           (Lee et al., ICML 2020) has, as remembered and not looked up: cross-entropy 70.36,
           LDAM-DRW 77.03, with SLA and self-distillation 80.24 %.

The class sizes are those of CIFAR-10-LT (Cao et al., NeurIPS 2019), 12,406 images; the test split
is balanced, so its accuracy is the mean over classes. Classes weigh differently over the last fifth
of the run, and LDAM's logits are cosines, as there. Here SLA is read off the joint head, over four
views: to self-distillation's class head the softmax of cosines, nearly uniform, would teach little.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sla


def get_config() -> ConfigDict:
    """The config; what is not set here is as in sla.py. Without an arm it trains LDAM-DRW."""
    config = sla.get_config()
    config.data.update({"per_class": 5000, "imbalance": 100.0})
    config.method = methods.all_methods(
        rule="drw",
        drw={"start": int(0.8 * config.train.steps)},
        sla={"mode": "sla", "predict": "aggregated"},
    )
    config.method.loss = "ldam"
    config.model.cosine = True
    config.arms = {
        "ce": {"model": {"cosine": False}, "method": {"rule": "as_given", "loss": "cross_entropy"}},
        "ldam_drw": {},
        "ldam_drw_sla": {"method": {"name": "sla"}},
    }
    return config
