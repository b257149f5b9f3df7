"""Restore or enlarge image files: whole images, exactly, in as little memory as asked for."""

from visionattn.cli.restore import main

if __name__ == "__main__":
    main()
