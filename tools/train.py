"""Train what a configuration describes, on one process or, launched by torchrun or accelerate, on many."""

from visionattn.cli.train import main

if __name__ == "__main__":
    main()
