"""Judge a network on the held-out data of a configuration or of a run, or on images that are named."""

from visionattn.cli.evaluate import main

if __name__ == "__main__":
    main()
