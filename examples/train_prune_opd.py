"""Distil a teacher into a student with Prune-OPD. The same as `prune-opd train`, as a file to copy and change.

    python examples/train_prune_opd.py --config examples/configs/embedded.yaml
    accelerate launch examples/train_prune_opd.py --config examples/configs/embedded.yaml --learning_rate 1e-4

`--help` explains every field; any of them may stand in the YAML file, and the command line overrides the file.
"""

import sys

from prune_opd_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
