"""`python -m vlmscope`."""

from vlmscope.cli.main import main

main()
