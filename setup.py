"""The packages of the wheel, in which the program's configurations are `train.configs`.

Everything else about the distribution is in pyproject.toml.
"""

import setuptools

CONFIGS = ["train.configs", "train.configs.pipelines", "train.configs.sweeps"]

setuptools.setup(
    packages=[
        *setuptools.find_packages(include=["inertia_jax*", "train*"]),
        *CONFIGS,
    ],
    package_dir={"train.configs": "configs"},
)
