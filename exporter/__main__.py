"""``python -m exporter`` is ``resnet-export``."""

from exporter.cli import main

if __name__ == "__main__":
    main()
