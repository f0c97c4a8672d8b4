"""The command line: flags only. Torch is imported when a command needs it, not for `--help`."""
