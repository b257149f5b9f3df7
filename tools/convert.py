"""Say which network a checkpoint belongs to; write it for timm, or back for its authors' code."""

from visionattn.cli.convert import main

if __name__ == "__main__":
    main()
