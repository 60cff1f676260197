"""`python -m provisioner.cli`, where no `provisioner` is installed."""

from .main import main

main(prog_name="provisioner")
