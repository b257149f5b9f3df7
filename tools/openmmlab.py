"""Train, judge and use the zoo's backbones inside mmdetection and mmsegmentation."""

from visionattn.cli.openmmlab import main

if __name__ == "__main__":
    main()
