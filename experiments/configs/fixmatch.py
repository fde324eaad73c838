"""FixMatch on garments: four labels a class and 20,000 images without, of Fashion-MNIST.

Command:   python -m experiments.prepare fashion_mnist
           python -m experiments.compare --config=experiments/configs/fixmatch.py --seeds=5
           and with 25 labels a class --config.data.val=250
Hardware:  one CPU core, about 15 ms a step of "fixmatch" where nothing else runs.
Expected:  seeds 0 to 4, 2026-11-26, test accuracy, mean and sd; and the difference to "labelled":
             40 labels:  labelled .6525, .0298; fixmatch .6451, .0253; fixmatch_saflex .6419, .0259
                         fixmatch -.0074 (-.0256 to +.0109), with saflex -.0106 (-.0228 to +.0016)
             250 labels: labelled .7444, .0146; fixmatch .7370, .0168; fixmatch_saflex .7374, .0172
                         fixmatch -.0074 (-.0148 to +.0000), with saflex -.0071 (-.0150 to +.0009)
           In 600 steps pseudo-labels give nothing here, and SAFLEX over them neither.

The setting of FixMatch's small experiments (Sohn et al., NeurIPS 2020) at a small size. The
labelled samples are the validation split: the arms share them, of one seed, and SAFLEX, which here
learns weights and labels of the strong views, has no others to direct it. They train as well.
"labelled" is FixMatch without its second term, hence plain training on the labelled samples, in the
same order and under the same weak augmentation. Images have 14x14 pixels to make it quick.
"""

from ml_collections import ConfigDict

from experiments.configs import methods, sources

STRONG = "randaugment(2, 10) | cutout(4)"

ARMS = {
    "labelled": {"method": {"rule": "as_given", "fixmatch": {"unlabelled_weight": 0.0}}},
    "fixmatch": {"method": {"rule": "as_given"}},
    "fixmatch_saflex": {"method": {"rule": "saflex"}},
}


def get_config() -> ConfigDict:
    """The config; what it trains without an arm is "fixmatch_saflex"."""
    return ConfigDict(
        {
            "seed": 0,
            "runner": "jit",
            "data": sources.section("fashion_mnist", size=14, val=40, train=20_000,
                                    unlabelled=True),
            "augment": "shift(1) | flip(0.5)",
            "model": {"name": "small_cnn", "widths": (16, 32, 64), "norm": "group"},
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 5e-4},
            "method": methods.all_methods("fixmatch", "saflex", fixmatch={"strong": STRONG}),
            "train": {"steps": 600, "batch_size": 64, "val_batch_size": 0, "log_every": 100,
                      "checkpoint_every": 500},
            "arms": ARMS,
        }
    )  # fmt: skip
