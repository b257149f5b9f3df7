"""Name what images show, restore them, or draw what is found in them, as follows from the network."""

from visionattn.cli.predict import main

if __name__ == "__main__":
    main()
