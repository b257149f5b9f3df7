"""Prepare images for training: cut them into pieces, or store them as LMDB, in BasicSR's layouts."""

from visionattn.cli.prepare import main

if __name__ == "__main__":
    main()
