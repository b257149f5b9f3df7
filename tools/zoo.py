"""List the networks: task, parameters, multiply-adds at the default input, licence, official result."""

from visionattn.cli.zoo import main

if __name__ == "__main__":
    main()
