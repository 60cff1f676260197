"""Adds what stands beside the package, templates, recipes and units, to the wheel.

Everything else is in pyproject.toml. In the package they are found first, in a checkout
beside it.
"""

from setuptools import find_packages, setup

BESIDE = ("templates", "images", "systemd")

setup(
    packages=[
        *find_packages(include=["provisioner", "provisioner.*"]),
        *(f"provisioner.{folder}" for folder in BESIDE),
    ],
    package_dir={f"provisioner.{folder}": folder for folder in BESIDE},
    package_data={
        **{f"provisioner.{folder}": ["**/*"] for folder in BESIDE},
        "provisioner.agent": ["*.sh"],
        "provisioner": ["ARCHITECTURE.md"],
    },
)
