"""Export a network to ONNX, a torch.export program, or an AOTInductor package; checked before it is kept."""

from visionattn.cli.export import main

if __name__ == "__main__":
    main()
