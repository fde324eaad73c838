"""SAFLEX over AutoMix's mixtures and over SLA's views, with 40 % wrong labels; Fashion-MNIST.

Command:   python -m experiments.prepare fashion_mnist
           python -m experiments.compare --config=experiments/configs/saflex_over.py --seeds=5
Hardware:  2 CPU cores, about 40 minutes (estimated from single steps).
Expected:  not run here; no published number to compare with.

The arms in pairs: "automix_saflex" with "automix", the table's base, and "sla_saflex" with
"sla_sd" (--resume --base=sla_sd). SAFLEX reads 500 trusted validation labels, which the others do
not see.

SAFLEX is the paper's rule along the implicit direction, with options chosen on digits. Its score
memory follows a view of SLA from visit to visit, but a mixture is never seen twice, so that over
AutoMix there is none.
"""

from ml_collections import ConfigDict

from experiments.configs import automix, methods


def get_config() -> ConfigDict:
    """The config; what is not set here is as in automix.py. Without an arm it trains AutoMix."""
    config = automix.get_config()
    config.data.noise = 0.4
    config.method = methods.all_methods(
        "automix",
        automix=config.method.automix.to_dict(),
        saflex_paper={
            "scoring": {"direction": "cg", "predicate": "head"},
            "rule": {"anchor": "log", "prior_strength": 0.5, "temperature": 0.5, "tolerance": 0.25},
        },
    )
    config.arms = {
        "automix": {},
        "automix_saflex": {"method": {"rule": "saflex_paper"}},
        "sla_sd": {"method": {"name": "sla"}},
        "sla_saflex": {
            "method": {
                "name": "sla",
                "rule": "saflex_paper",
                "saflex_paper": {"rule": {"memory": {"decay": 0.97}}},
            }
        },
    }
    return config
