"""`python -m fedmpt_flare` is the `fedmpt` command."""

from fedmpt_flare.cli.main import main

main()
