"""`python -m bgd_plugin.cli`."""

from bgd_plugin.cli.app import main

main()
