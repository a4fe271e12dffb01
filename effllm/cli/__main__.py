"""`python -m effllm.cli`."""

from effllm.cli import main

main()
