"""See what a network looks at: `lam` draws the local attribution map of a super-resolution network."""

from visionattn.cli.explain import main

if __name__ == "__main__":
    main()
