#!/usr/bin/env python3
"""List the shards and tensors of an offload folder, a checkpoint or one safetensors file."""

from diskoffload.cli import main

if __name__ == "__main__":
    import sys

    sys.exit(main(["inspect", *sys.argv[1:]]))
