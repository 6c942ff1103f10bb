"""The command line `bgd-plugin`."""
